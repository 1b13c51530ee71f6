"""How each canonical operator is lowered, one small function each."""

from collections.abc import Callable

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from targets.slice_weights import bias_add, constant_integers, dequantized, matrix_of, transposed, widened
from targets.tensorrt import attention, products
from targets.tensorrt.lowering import Flat, SliceLowering
from targets.tensorrt.typed_graph import FLOAT


def lower_node(low: SliceLowering, node: ir.Node) -> None:
    """Lower one node. Raises UnsupportedError naming an operator that has no place in the typed graph."""
    if node in low.taken:
        return
    handler = HANDLERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if handler is None:
        raise low.refuse(f"operator {node.domain or 'ai.onnx'}.{node.op_type} is unknown")
    handler(low, node)


def _dequantize(low: SliceLowering, node: ir.Node) -> None:
    low.values[node.outputs[0]] = dequantized(low.values, node, low.width, low.refuse)


def _cast(low: SliceLowering, node: ir.Node) -> None:
    low.values[node.outputs[0]] = widened(low.values, node, low.refuse)


def _transpose(low: SliceLowering, node: ir.Node) -> None:
    matrix = matrix_of(low.values, node.inputs[0])
    if matrix is None:
        low.copy(node, "self_attn.heads")
    else:
        low.values[node.outputs[0]] = transposed(matrix, node, low.refuse)


def _matmul(low: SliceLowering, node: ir.Node) -> None:
    """MatMul with a weight, and an Add of a bias that follows: its value is then the product's too."""
    x, weight = node.inputs
    matrix = matrix_of(low.values, weight)
    if matrix is None or x is None:
        raise low.refuse("MatMul of two activations")
    y = products.product(low, x, matrix)
    if (found := bias_add(low.values, node)) is not None:
        add, vector = found
        low.taken.add(add)
        y = low.values[add.outputs[0]] = products.bias(low, y, vector)
    low.values[node.outputs[0]] = y


def _add(low: SliceLowering, node: ir.Node) -> None:
    low.copy(node, "residual")


def _rms_norm(low: SliceLowering, node: ir.Node) -> None:
    matrix = matrix_of(low.values, node.inputs[1])
    axis = node.attributes.get_int("axis", -1)
    if matrix is None or axis != -1:
        raise low.refuse(f"RMSNormalization along axis {axis}")
    low.copy(node, matrix.name.removesuffix(".weight").removeprefix(low.prefix))


def _gather(low: SliceLowering, node: ir.Node) -> None:
    table, indices = node.inputs
    if node.attributes.get_int("axis", 0) != 0 or table is None:
        raise low.refuse("Gather along another axis than the first")
    flat, matrix = low.values.get(table), matrix_of(low.values, table)
    if isinstance(flat, Flat):
        low.values[node.outputs[0]] = _last_positions(low, flat, indices)
    elif matrix is None or not isinstance(matrix.weight, CheckpointWeight) or matrix.part or matrix.transposed:
        raise low.refuse(f"Gather from {table.name}, which is no table of embeddings")
    elif matrix.weight.precision.is_coded:
        raise low.refuse(f"{matrix.name} is stored as {matrix.weight.precision.describe()}")
    else:
        name = matrix.name.removesuffix(".weight")
        stored = low.graph.initializer(low.weights.floats(matrix.name, matrix.weight))
        rows = low.graph.make("Gather", [stored, low.tensor(indices)], name, attributes={"axis": 0})
        low.values[node.outputs[0]] = low.graph.cast(rows, FLOAT, name)


def _last_positions(low: SliceLowering, flat: Flat, indices: ir.Value | None) -> ir.Value:
    """hidden [B, S, H] at the position that `last_rows` [B] names in each row -> [B, H]."""
    if indices is None or not indices.is_graph_input() or indices.name != "rows":
        raise low.refuse("the head chooses other rows than those it is asked for")
    chosen = low.graph.make("Unsqueeze", [low.step.last_rows, low.graph.constant([1])], "head.last_rows")
    return low.graph.make("GatherND", [flat.hidden, chosen], "head.last_hidden", attributes={"batch_dims": 1})


def _reshape(low: SliceLowering, node: ir.Node) -> None:
    source = node.inputs[0]
    if low.slice.kind == "head" and source is not None and source.is_graph_input():
        shape = constant_integers(node.inputs[1])
        if len(shape) != 2 or shape[0] != -1:
            raise low.refuse(f"the head's hidden states are reshaped to {shape}")
        low.values[node.outputs[0]] = Flat(low.tensor(source))
    else:
        low.copy(node, "self_attn.reshape")


def _split(low: SliceLowering, node: ir.Node) -> None:
    low.copy(node, "split")


def _swish(low: SliceLowering, node: ir.Node) -> None:
    low.copy(node, "mlp.swish")


def _mul(low: SliceLowering, node: ir.Node) -> None:
    low.copy(node, "mlp.mul")


HANDLERS: dict[str, Callable[[SliceLowering, ir.Node], None]] = {
    "DequantizeLinear": _dequantize,
    "Cast": _cast,
    "Transpose": _transpose,
    "MatMul": _matmul,
    "Add": _add,
    "RMSNormalization": _rms_norm,
    "Swish": _swish,
    "Gather": _gather,
    "Mul": _mul,
    "Split": _split,
    "Reshape": _reshape,
    "RotaryEmbedding": attention.rotary_embedding,
    "TensorScatter": attention.tensor_scatter,
    "ReduceMax": attention.longest_row,
    "Slice": attention.live_positions,
    "Attention": attention.attention,
}
