"""How each canonical operator outside attention is lowered, one small function each."""

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from targets.tvm.formats import multiplies_integers
from targets.tvm.lower import attention
from targets.tvm.lower.checks import check_attributes, check_inputs, constant_integers, is_last_axis
from targets.tvm.lower.emit import write_product
from targets.tvm.lower.program import Kernel
from targets.tvm.lower.slice_lowering import SliceLowering
from targets.tvm.lower.values import (
    Activated,
    Attended,
    Cached,
    Gated,
    Heads,
    Matrix,
    Norm,
    Part,
    Product,
    Rounded,
    StepInput,
    Stream,
    WeightRef,
)

FLOAT = int(ir.DataType.FLOAT)


def lower_node(low: SliceLowering, node: ir.Node) -> None:
    """Lower one node. Raises UnsupportedError naming an operator or a use that kernels have no place for."""
    handler = HANDLERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if handler is None:
        raise low.refuse(f"operator {node.domain or 'ai.onnx'}.{node.op_type} is unknown")
    if not any(output.is_graph_output() or output.uses() for output in node.outputs):
        raise low.refuse(f"{node.op_type} computes {node.outputs[0].name}, which nothing uses")
    handler(low, node)


def _dequantize(low: SliceLowering, node: ir.Node) -> None:
    """codes, scales (and zero points) of one weight become that weight again."""
    parts = [low.lowered(value) for value in node.inputs]
    first, names = parts[0], ("codes", "scales", "zero_points")[: len(parts)]
    for part, name in zip(parts, names, strict=True):
        if not isinstance(part, WeightRef) or part.part != name:
            raise low.refuse(f"DequantizeLinear of {[value and value.name for value in node.inputs]}")
        if part.name != first.name:
            raise low.refuse(f"{first.name} is dequantized with {name} of another weight, {part.name}")
    precision = getattr(first.weight, "precision", None)
    found = (node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0), len(parts) == 2)
    if precision is None or found != (1, precision.group_of(low.shape(first)[-1]), precision.symmetric):
        raise low.refuse(f"{first.name} is dequantized with axis, block size, symmetry {found}, stored as {precision}")
    check_attributes(low, node, axis=None, block_size=None, output_dtype=0)
    low.values[node.outputs[0]] = WeightRef(first.name, first.weight)


def _cast(low: SliceLowering, node: ir.Node) -> None:
    ref = low.lowered(node.inputs[0])
    check_attributes(low, node, to=FLOAT, saturate=1)
    if not isinstance(ref, WeightRef) or not ref.cast:
        raise low.refuse("Cast of something else than a half-precision weight")
    low.values[node.outputs[0]] = WeightRef(ref.name, ref.weight)


def _transpose(low: SliceLowering, node: ir.Node) -> None:
    x = low.lowered(node.inputs[0])
    check_attributes(low, node, perm=None)
    perm = tuple(node.attributes.get_ints("perm", ()))
    if isinstance(x, WeightRef) and x.is_plain and perm == (1, 0):
        low.values[node.outputs[0]] = replace(x, transposed=True)
    elif isinstance(x, Heads | Attended):
        low.values[node.outputs[0]] = attention.transpose(low, x, perm)
    else:
        raise low.refuse(f"Transpose {perm} of {node.inputs[0].name if node.inputs[0] else None}")


def _matmul(low: SliceLowering, node: ir.Node) -> None:
    """A product with a transposed weight, written when it is known what follows."""
    check_inputs(low, node, 2)
    x, ref = (low.lowered(value) for value in node.inputs)
    if not isinstance(ref, WeightRef) or not ref.transposed or not isinstance(ref.weight, CheckpointWeight):
        raise low.refuse(f"MatMul of {[value and value.name for value in node.inputs]} without a transposed weight")
    shape, asked = low.shape(ref), ref.weight.precision.activations
    if len(shape) != 2 or x is None:
        raise low.refuse(f"MatMul with {ref.name} {list(shape)}")
    given = x.activations if isinstance(x, Rounded) else ""
    if given != asked:
        raise low.refuse(
            f"the input of {ref.name} is rounded to {given or 'nothing'}, its recipe says {asked or 'not'}"
        )
    x = x.x if isinstance(x, Rounded) else x
    low.values[node.outputs[0]] = Product(x, Matrix(ref.name, ref.weight, *shape))


def _add(low: SliceLowering, node: ir.Node) -> None:
    """A bias joins its product; the product of a block is added to the residual stream in place."""
    check_inputs(low, node, 2)
    first, second = (low.lowered(value) for value in node.inputs)
    if isinstance(first, WeightRef) or isinstance(second, Product):
        first, second = second, first
    if isinstance(first, Product) and isinstance(second, WeightRef) and first.bias is None:
        low.values[node.outputs[0]] = replace(first, bias=second)
    elif isinstance(first, Product) and isinstance(second, Stream):
        low.values[node.outputs[0]] = _add_residual(low, first, second)
    else:
        raise low.refuse(f"Add of {[value and value.name for value in node.inputs]}: no bias and no residual")


def _add_residual(low: SliceLowering, product: Product, stream: Stream) -> Stream:
    if stream != low.stream:
        raise low.refuse("a residual is added to an older state of the stream")
    if product.matrix.rows != low.setting.config.hidden_size:
        raise low.refuse(f"{product.matrix.name} gives {product.matrix.rows} columns for the residual stream")
    write_product(low, product, "add", low.parameters["hidden"])
    low.stream = Stream(stream.version + 1)
    return low.stream


def _rms_norm(low: SliceLowering, node: ir.Node) -> None:
    check_inputs(low, node, 2)
    check_attributes(low, node, axis=None, epsilon=None, stash_type=1)
    stream, gamma = (low.lowered(value) for value in node.inputs)
    axis = node.attributes.get_int("axis", -1)
    if not isinstance(stream, Stream) or not isinstance(gamma, WeightRef):
        raise low.refuse(f"RMSNormalization of {[value and value.name for value in node.inputs]}")
    if axis != -1 and axis != (1 if stream.flat else 2):
        raise low.refuse(f"RMSNormalization along axis {axis}")
    low.values[node.outputs[0]] = Norm(stream, gamma, node.attributes.get_float("epsilon", 1e-5))


def _split(low: SliceLowering, node: ir.Node) -> None:
    check_attributes(low, node, axis=None, num_outputs=len(node.outputs))
    product, axis = low.lowered(node.inputs[0]), node.attributes.get_int("axis", 0)
    if not isinstance(product, Product) or not is_last_axis(axis):
        raise low.refuse(f"Split along axis {axis} of something else than a product")
    widths = constant_integers(node.inputs[1] if len(node.inputs) > 1 else None)
    if len(widths) != len(node.outputs) or sum(widths) != product.matrix.rows:
        raise low.refuse(f"Split of {product.matrix.name} into {list(widths)}, it has {product.matrix.rows} rows")
    for index, output in enumerate(node.outputs):
        low.values[output] = Part(product, widths, index)


def _swish(low: SliceLowering, node: ir.Node) -> None:
    check_attributes(low, node, alpha=1.0)
    part = low.lowered(node.inputs[0])
    if not isinstance(part, Part) or part.index != 0:
        raise low.refuse("Swish of something else than the first part of a product")
    low.values[node.outputs[0]] = Activated(part)


def _mul(low: SliceLowering, node: ir.Node) -> None:
    """silu(gate) * up becomes the epilogue of the product that gave both."""
    check_inputs(low, node, 2)
    first, second = (low.lowered(value) for value in node.inputs)
    if isinstance(second, Activated):
        first, second = second, first
    if not isinstance(first, Activated) or not isinstance(second, Part) or replace(second, index=0) != first.part:
        raise low.refuse("Mul of something else than silu(gate) and up of one product")
    if second.index != 1 or len(second.widths) != 2 or second.widths[0] != second.widths[1]:
        raise low.refuse(f"gate and up are parts of {list(second.widths)}")
    low.values[node.outputs[0]] = Gated(second.product)


def _gather(low: SliceLowering, node: ir.Node) -> None:
    """Rows of the embedding table become the stream; chosen rows of the stream are read by the norm behind them."""
    check_inputs(low, node, 2)
    check_attributes(low, node, axis=0)
    table, indices = (low.lowered(value) for value in node.inputs)
    if isinstance(table, Stream) and table.flat and not table.chosen and indices == StepInput("rows"):
        low.values[node.outputs[0]] = replace(table, chosen=True)
    elif isinstance(table, WeightRef) and table.is_plain and indices == StepInput("input_ids"):
        low.values[node.outputs[0]] = _embed(low, table)
    else:
        raise low.refuse(f"Gather from {[value and value.name for value in node.inputs]}")


def _embed(low: SliceLowering, table: WeightRef) -> Stream:
    rows, width = low.shape(table)
    weight = table.weight
    assert isinstance(weight, CheckpointWeight)
    if width != low.setting.config.hidden_size:
        raise low.refuse(f"{table.name} is {width} wide")
    if multiplies_integers(weight.precision):
        kernel = Kernel("embedding_int", (weight.precision.weight_only, rows, width))
    else:
        kernel = Kernel("embedding_float", (weight.precision.kind, rows, width))
    stored = low.weight(Matrix(table.name, weight, rows, width))
    low.call(kernel, [low.parameters["ids"], stored], written=(low.parameters["hidden"],))
    return low.stream


def _reshape(low: SliceLowering, node: ir.Node) -> None:
    check_inputs(low, node, 2)
    check_attributes(low, node, allowzero=0)
    x, shape = low.lowered(node.inputs[0]), constant_integers(node.inputs[1])
    if isinstance(x, Stream) and not x.flat and shape == (-1, low.setting.config.hidden_size):
        low.values[node.outputs[0]] = replace(x, flat=True)
    elif isinstance(x, Part | Attended):
        low.values[node.outputs[0]] = attention.reshape(low, x, shape)
    else:
        raise low.refuse(f"Reshape of {node.inputs[0].name if node.inputs[0] else None} to {list(shape)}")


def lower_outputs(low: SliceLowering) -> None:
    """Check that the slice's outputs are what its function leaves behind, and write what is still pending."""
    for output in low.slice.structure.graph.outputs:
        value = low.lowered(output)
        if output.name == "logits" and isinstance(value, Product):
            if value.matrix.rows != low.setting.config.head_size:
                raise low.refuse(f"{value.matrix.name} gives {value.matrix.rows} logits")
            write_product(low, value, "plain", low.parameters["logits"])
        elif output.name in ("present_key", "present_value"):
            past = str(output.name).replace("present", "past")
            if not isinstance(value, Cached) or value.live or value.past != past or value not in low.written:
                raise low.refuse(f"{output.name} is not the cache that attention has read")
        elif value != low.stream or output.name not in ("hidden", "hidden_out"):
            raise low.refuse(f"output {output.name} is not the residual stream")


HANDLERS: dict[str, Callable[[SliceLowering, ir.Node], None]] = {
    "DequantizeLinear": _dequantize,
    "Cast": _cast,
    "Transpose": _transpose,
    "MatMul": _matmul,
    "Add": _add,
    "RMSNormalization": _rms_norm,
    "Split": _split,
    "Swish": _swish,
    "Mul": _mul,
    "Gather": _gather,
    "Reshape": _reshape,
    "RotaryEmbedding": attention.rotary,
    "TensorScatter": attention.scatter,
    "ReduceMax": attention.longest,
    "Slice": attention.cut,
    "Attention": attention.attend,
}
