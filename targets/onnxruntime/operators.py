"""How each canonical operator outside the attention group is lowered, one small function each."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from targets.onnxruntime import embedding, matmul
from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.lowering import SliceLowering, Sum
from targets.onnxruntime.stored_rows import in_blocks
from targets.slice_weights import (
    Matrix,
    Rounded,
    bias_add,
    constant_integers,
    dequantized,
    matrix_of,
    transposed,
    widened,
)


def lower_node(low: SliceLowering, node: ir.Node) -> None:
    """Lower one node. Raises UnsupportedError naming an operator that ONNX Runtime's dialect has no place for."""
    if node in low.taken:
        return
    handler = HANDLERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if handler is None:
        raise low.refuse(f"operator {node.domain or 'ai.onnx'}.{node.op_type} is unknown")
    handler(low, node)


def _matrix(low: SliceLowering, value: ir.Value | None) -> Matrix | None:
    return matrix_of(low.values, value)


def _dequantize(low: SliceLowering, node: ir.Node) -> None:
    low.values[node.outputs[0]] = dequantized(low.values, node, low.width, low.refuse)


def _cast(low: SliceLowering, node: ir.Node) -> None:
    low.values[node.outputs[0]] = widened(low.values, node, low.refuse)


def _transpose(low: SliceLowering, node: ir.Node) -> None:
    matrix = _matrix(low, node.inputs[0])
    if matrix is None:
        _copy(low, node)
    else:
        low.values[node.outputs[0]] = transposed(matrix, node, low.refuse)


def _matmul(low: SliceLowering, node: ir.Node) -> None:
    """MatMul with a weight. An Add of a bias that follows is taken in, its value is then the product's too; a Split
    that follows becomes products with parts of the weight's rows, which saves the copies."""
    x, weight = node.inputs
    matrix = _matrix(low, weight)
    if matrix is None or x is None:
        raise low.refuse("MatMul of two activations")
    value, bias = node.outputs[0], None
    if (found := bias_add(low.values, node)) is not None:
        add, bias = found
        value = add.outputs[0]
        low.taken.add(add)
    split = _following_split(low, value)
    if split is None:
        low.values[value] = _product(low, x, matrix, bias)
        return
    low.taken.add(split)
    for output, part, rows in zip(split.outputs, *_row_parts(low, matrix, split), strict=True):
        chosen = replace(matrix, name=f"{part}.weight", rows=rows)
        low.values[output] = _product(low, x, chosen, bias and replace(bias, name=f"{part}.bias", rows=rows))


def _product(low: SliceLowering, x: ir.Value, matrix: Matrix, bias: Matrix | None) -> ir.Value:
    return matmul.matmul(low, _multiplied(low, x, matrix), matrix, None if bias is None else low.weight_tensor(bias))


def _multiplied(low: SliceLowering, x: ir.Value, matrix: Matrix) -> ir.Value:
    """What a weight multiplies in the engine: MatMulNBits itself rounds to int8, in blocks, and so at least as finely
    as the canonical graph asks; any other product takes the input as that graph rounds it."""
    pending, precision = low.values.get(x), getattr(matrix.weight, "precision", None)
    if isinstance(pending, Rounded) and pending.group.kind == "int8" and precision and in_blocks(precision):
        return low.tensor(pending.group.source)
    return low.tensor(x)


def _following_split(low: SliceLowering, value: ir.Value) -> ir.Node | None:
    users = list(value.consumers())
    if len(users) != 1 or users[0].op_type != "Split" or users[0] in low.claimed:
        return None
    return users[0] if users[0].attributes.get_int("axis", 0) in (-1, 2) else None


def _row_parts(low: SliceLowering, matrix: Matrix, split: ir.Node) -> tuple[list[str], list[tuple[int, int]]]:
    """Names and rows of the parts: called after the checkpoint's tensors where the parts are just those."""
    assert isinstance(matrix.weight, CheckpointWeight)
    widths = list(constant_integers(split.inputs[1]))
    sources = low.weights.source_rows(matrix.weight)
    if sum(widths) != sum(sources):
        raise low.refuse(f"Split of {matrix.name} into {widths}, it has {sum(sources)} rows")
    ends = list(accumulate(widths))
    names = [f"{matrix.name.removesuffix('.weight')}.{index}" for index in range(len(widths))]
    if widths == sources:
        # model.layers.N.mlp.gate_proj.weight
        names = [low.prefix + source.split(".", 3)[3].removesuffix(".weight") for source in matrix.weight.sources]
    return names, list(zip([0, *ends], ends, strict=False))


def _add(low: SliceLowering, node: ir.Node) -> None:
    left, right = (low.tensor(value) for value in node.inputs if value is not None)
    leaves = node.outputs[0].is_graph_output()
    index = low.slice.index
    following = f"layers.{index + 1}.hidden" if leaves and index is not None else f"{low.prefix}residual"
    low.values[node.outputs[0]] = Sum(left, right, following)


def _rms_norm(low: SliceLowering, node: ir.Node) -> None:
    """A norm of a pending Sum becomes SkipSimplifiedLayerNormalization, which gives the sum as well."""
    x, scale = node.inputs
    matrix = _matrix(low, scale)
    axis, epsilon = node.attributes.get_int("axis", -1), node.attributes.get_float("epsilon", 1e-5)
    if x is None or scale is None or matrix is None or axis != -1:
        raise low.refuse(f"RMSNormalization along axis {axis} with scale {scale.name if scale else None}")
    name = matrix.name.removesuffix(".weight")
    gamma = low.tensor(scale)
    pending = low.values.get(x)
    if isinstance(pending, Sum):
        normed = low.graph.op(
            "SkipSimplifiedLayerNormalization",
            [pending.left, pending.right, gamma],
            name,
            domain=MICROSOFT,
            outputs=[f"{name}.out", "", "", pending.name],
            attributes={"epsilon": epsilon},
        )
        low.values[x] = low.graph.last_node.outputs[3]
    else:
        attributes: dict[str, int | float] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        normed = low.graph.op("SimplifiedLayerNormalization", [low.tensor(x), gamma], name, attributes={**attributes})
    low.values[node.outputs[0]] = normed


def _swish(low: SliceLowering, node: ir.Node) -> None:
    """x * sigmoid(alpha * x), the kernel that ONNX Runtime calls QuickGelu."""
    x = node.inputs[0]
    assert x is not None
    alpha = node.attributes.get_float("alpha", 1.0)
    low.values[node.outputs[0]] = low.graph.op(
        "QuickGelu", [low.tensor(x)], f"{low.prefix}mlp.swish", domain=MICROSOFT, attributes={"alpha": alpha}
    )


def _gather(low: SliceLowering, node: ir.Node) -> None:
    table, indices = node.inputs
    if table is None or indices is None:
        raise low.refuse("Gather without a table or indices")
    matrix = _matrix(low, table)
    if matrix is None:
        _copy(low, node)
        return
    if node.attributes.get_int("axis", 0) != 0:
        raise low.refuse(f"Gather from {matrix.name} along another axis than its rows")
    low.values[node.outputs[0]] = embedding.gather(low, matrix, low.tensor(indices))


def _copy(low: SliceLowering, node: ir.Node) -> None:
    low.copy(node)


HANDLERS: dict[str, Callable[[SliceLowering, ir.Node], None]] = {
    "DequantizeLinear": _dequantize,
    "Cast": _cast,
    "Transpose": _transpose,
    "MatMul": _matmul,
    "Add": _add,
    "RMSNormalization": _rms_norm,
    "Swish": _swish,
    "Gather": _gather,
    "Mul": _copy,
    "Split": _copy,
    "Reshape": _copy,
    # Attention whose heads GroupQueryAttention does not take stays in standard operators.
    "RotaryEmbedding": _copy,
    "TensorScatter": _copy,
    "ReduceMax": _copy,
    "Slice": _copy,
    "Attention": _copy,
}
