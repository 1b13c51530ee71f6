"""Writing the kernel calls of pending values: norms, quantized activations, products with their epilogues."""

from targets.base import ActivationRounding
from targets.tvm.activations import activation_rounding, has_base
from targets.tvm.formats import multiplies_integers, stored_group
from targets.tvm.lower.emit_attention import write_attention
from targets.tvm.lower.program import Kernel, Size, Tensor
from targets.tvm.lower.slice_lowering import SliceLowering
from targets.tvm.lower.values import Attended, Gated, Lowered, Norm, Product, Stream


def activations(low: SliceLowering, value: Lowered) -> Tensor:
    """A value as float32 [T, K] (or [Q, K] behind the choice of rows); each value is written once."""
    if isinstance(value, Stream):
        return read_stream(low, value)
    if value not in low.written:
        low.written[value] = (_write(low, value),)
    return low.written[value][0]


def read_stream(low: SliceLowering, stream: Stream) -> Tensor:
    """The buffer of the residual stream; it is changed in place, so an older state cannot be read again."""
    if stream.version != low.stream.version:
        raise low.refuse("the residual stream is read after the next residual was added to it")
    if stream.chosen:
        raise low.refuse("chosen rows of the residual stream go to something else than a norm")
    return low.parameters["hidden"]


def width_of(low: SliceLowering, value: Lowered) -> int:
    """How many columns a value has."""
    if isinstance(value, Product):
        return value.matrix.rows
    if isinstance(value, Gated):
        return value.product.matrix.rows // 2
    if isinstance(value, Attended):
        return value.query.heads * value.query.head_dim
    return low.setting.config.hidden_size


def rows_of(value: Lowered) -> str:
    """`Q` for what is computed for the wanted rows alone, else `T`."""
    while isinstance(value, Product | Gated):
        value = value.product if isinstance(value, Gated) else value.x
    stream = value.stream if isinstance(value, Norm) else value
    return "Q" if isinstance(stream, Stream) and stream.chosen else "T"


def write_product(low: SliceLowering, product: Product, epilogue: str, into: Tensor | None = None) -> Tensor:
    """A product: stored (`plain`), added to `into` (`add`) or gated (`swiglu`); returns what holds the result.

    With `plain`, `into` is filled instead of a new tensor.
    """
    matrix = product.matrix
    if (found := width_of(low, product.x)) != matrix.width:
        raise low.refuse(f"{matrix.name} multiplies {found} columns, it has {matrix.width}")
    inputs, kernel = _multiplier(low, product, epilogue)
    inputs.append(low.weight(matrix, interleaved=epilogue == "swiglu"))
    if product.bias is not None:
        inputs.append(low.vector(product.bias, matrix.rows))
    if into is not None:
        low.call(kernel, inputs, written=(into,))
        return into
    columns = matrix.rows // 2 if epilogue == "swiglu" else matrix.rows
    return low.call(kernel, inputs, [("float32", (rows_of(product.x), columns))])[0]


def _multiplier(low: SliceLowering, product: Product, epilogue: str) -> tuple[list[Tensor], Kernel]:
    """What a product's kernel reads of its input, and the kernel."""
    matrix, precision = product.matrix, product.matrix.weight.precision
    rounding, shape = activation_rounding(precision), (matrix.rows, matrix.width, epilogue, product.bias is not None)
    if multiplies_integers(precision):
        assert rounding is not None
        group = stored_group(precision, matrix.width)
        if group == 0 or matrix.width % group:
            raise low.refuse(f"{matrix.name} has {matrix.width} columns, no multiple of its groups of {group}")
        return [*quantized(low, product.x, group, rounding)], Kernel("linear_int", (precision, *shape))
    x = rounded_fp8(low, product.x) if rounding == "fp8-token" else activations(low, product.x)
    return [x], Kernel("linear_float", (precision.kind, *shape))


def rounded_fp8(low: SliceLowering, value: Lowered) -> Tensor:
    """A value as float32 [T, K] rounded to E4M3, a scale for each row; written once."""
    key = ("rounded", value)
    if key not in low.written:
        rows, width = rows_of(value), width_of(low, value)
        low.written[key] = low.call(
            Kernel("round_fp8", (width,)), [activations(low, value)], [("float32", (rows, width))]
        )
    return low.written[key][0]


def quantized(low: SliceLowering, value: Lowered, group: int, rounding: ActivationRounding) -> tuple[Tensor, ...]:
    """A value as int8 codes (four a word), scales (or shifts) and sums of each group, and with some roundings a base
    for each row; readers of equal groups and scales share them."""
    key = ("quantized", value, group, rounding)
    if key not in low.written:
        rows, width, exponents = rows_of(value), width_of(low, value), has_base(rounding)
        outputs: list[tuple[str, tuple[Size, ...]]] = [
            ("int32", (rows, width // 4)),
            ("int32" if exponents else "float32", (rows, width // group)),
            ("int32", (rows, width // group)),
        ]
        if exponents:
            outputs.append(("float32", (rows,)))
        if isinstance(value, Norm):
            kernel = Kernel("norm_quantize", (width, group, value.epsilon, value.stream.chosen, rounding))
            low.written[key] = low.call(kernel, _norm_inputs(low, value), outputs)
        else:
            x = activations(low, value)
            low.written[key] = low.call(Kernel("quantize", (width, group, rounding)), [x], outputs)
    return low.written[key]


def _write(low: SliceLowering, value: Lowered) -> Tensor:
    if isinstance(value, Norm):
        width = width_of(low, value)
        kernel = Kernel("norm", (width, value.epsilon, value.stream.chosen))
        return low.call(kernel, _norm_inputs(low, value), [("float32", (rows_of(value), width))])[0]
    if isinstance(value, Product):
        return write_product(low, value, "plain")
    if isinstance(value, Gated):
        return write_product(low, value.product, "swiglu")
    if isinstance(value, Attended) and value.merged:
        return write_attention(low, value, activations(low, value.query.part.product))
    raise low.refuse(f"the numbers of an unfinished {type(value).__name__} are asked for")


def _norm_inputs(low: SliceLowering, norm: Norm) -> list[Tensor]:
    stream = norm.stream
    x = read_stream(low, Stream(stream.version))
    gamma = low.vector(norm.gamma, low.setting.config.hidden_size)
    return [x, low.parameters["out_rows"], gamma] if stream.chosen else [x, gamma]
