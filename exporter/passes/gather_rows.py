"""The head computes only the rows it is asked for."""

import onnx_ir as ir

from exporter.core.canonical import Slice
from exporter.passes.editing import INT64, add_constant, add_input, find_input, new_node
from exporter.passes.rule import Context, Outcome


def gather_rows(piece: Slice, context: Context) -> Outcome:
    """Flatten hidden [B, S, H] to [B * S, H] and take `rows` [R] of it before anything else: logits become [R, V].

    Does not fire when any operator of the head mixes rows: all must be RMSNormalization over the last axis,
    Transpose of a weight, or MatMul with a matrix.
    """
    graph = piece.structure.graph
    hidden = find_input(graph, "hidden")
    if hidden is None or not hidden.uses():
        return Outcome(0, "the head does not read hidden")
    if odd := next((node for node in graph if not _keeps_rows(node, hidden)), None):
        return Outcome(0, f"{odd.op_type} {odd.outputs[0].name!r} may mix rows")
    uses = tuple(hidden.uses())
    rows = add_input(graph, "rows", ["R"], INT64)
    target = add_constant(graph, "flat_shape", [-1, context.config.hidden_size])
    flat = new_node("Reshape", [hidden, target], ["flat_hidden"])
    chosen = new_node("Gather", [flat.outputs[0], rows], ["row_hidden"], {"axis": 0})
    graph.insert_before(graph[0], [flat, chosen])
    for node, index in uses:
        node.replace_input_with(index, chosen.outputs[0])
    return Outcome(1)


def _keeps_rows(node: ir.Node, hidden: ir.Value) -> bool:
    if node.op_type == "RMSNormalization":
        return node.attributes.get_int("axis", -1) == -1
    if node.op_type == "MatMul":
        matrix = node.inputs[1].producer() if node.inputs[1] is not None else None
        return matrix is not None and matrix.op_type == "Transpose"
    source = node.inputs[0] if node.inputs else None
    is_weight = source is not None and source.is_graph_input() and source is not hidden
    return node.op_type == "Transpose" and is_weight
