"""A cache that grows by Concat becomes a fixed buffer written in place; the mask becomes causality and lengths."""

import onnx_ir as ir

from exporter.core.canonical import Slice
from exporter.passes.editing import INT64, add_constant, add_input, find_input, new_node, take_over
from exporter.passes.rule import Context, Outcome


def use_static_cache(piece: Slice, context: Context) -> Outcome:
    """Write new keys and values at `write_indices` into past_key and past_value [B, Hkv, M, D] (TensorScatter-24),
    attend causally to the first max(`nonpad_kv_seqlen`) positions (Attention-24), and drop attention_mask.

    The same function only for a causal mask over right-padded rows, which is what the interface promises.
    Does not fire when keys or values do not come from joining past and new along the positions, when past is no
    input or the join no output of the slice, when the mask has another use, or when Attention is causal already.
    """
    graph = piece.structure.graph
    nodes = [node for node in graph if node.op_type == "Attention"]
    if len(nodes) != 1:
        return Outcome(0, f"{len(nodes)} Attention operators instead of one")
    joins = [_join(nodes[0], i, name) for i, name in ((1, "key"), (2, "value"))]
    mask = find_input(graph, "attention_mask")
    if why := next((join for join in joins if isinstance(join, str)), _odd_mask(nodes[0], mask)):
        return Outcome(0, why)
    assert mask is not None
    write = add_input(graph, "write_indices", ["B"], INT64)
    lengths = add_input(graph, "nonpad_kv_seqlen", ["B"], INT64)
    longest = new_node("ReduceMax", [lengths], ["longest"], {"keepdims": 1})
    graph.insert_before(nodes[0], longest)
    bounds = [add_constant(graph, "slice_start", [0]), longest.outputs[0], add_constant(graph, "slice_axis", [2])]
    live = [_scatter(graph, join, write, bounds) for join in joins if not isinstance(join, str)]
    _attend_causally(nodes[0], live, lengths)
    graph.inputs.remove(mask)
    return Outcome(1)


def _join(attention: ir.Node, index: int, part: str) -> ir.Node | str:
    """The Concat of past and new that feeds input `index` of Attention, or why it is not one."""
    joined = attention.inputs[index]
    node = joined.producer() if joined is not None else None
    if joined is None or node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return f"{part}s do not come from joining past and new"
    if node.attributes["axis"].as_int() not in (-2, 2):
        return f"{part}s are joined along axis {node.attributes['axis'].as_int()}, not along positions"
    past = node.inputs[0]
    if past is None or past.name != f"past_{part}" or not past.is_graph_input():
        return f"{part}s are not joined to past_{part}"
    if joined.name != f"present_{part}" or not joined.is_graph_output():
        return f"the joined {part}s are not present_{part}"
    return node


def _odd_mask(attention: ir.Node, mask: ir.Value | None) -> str:
    if attention.attributes.get_int("is_causal", 0) or len(attention.inputs) != 4:
        return "Attention is causal already, or has other inputs than query, key, value and mask"
    if mask is None or attention.inputs[3] is not mask or len(mask.uses()) != 1:
        return "attention_mask is not used by Attention, and by it alone"
    return ""


def _scatter(graph: ir.Graph, join: ir.Node, write: ir.Value, bounds: list[ir.Value]) -> ir.Value:
    """Replace a join by a write in place; the live part [B, Hkv, max length, D] of the buffer."""
    past, new = join.inputs
    assert past is not None and past.shape is not None
    past.shape = ir.Shape([past.shape[0], past.shape[1], "M", past.shape[3]])
    written = join.outputs[0].name or ""
    scatter = new_node("TensorScatter", [past, new, write], [written], {"axis": -2})
    live = new_node("Slice", [scatter.outputs[0], *bounds], [written.replace("present", "live")])
    graph.insert_after(join, [scatter])
    take_over(scatter.outputs[0], join.outputs[0])
    attention = next(node for node, _ in scatter.outputs[0].uses() if node.op_type == "Attention")
    graph.insert_before(attention, [live])
    graph.remove(join, safe=True)
    return live.outputs[0]


def _attend_causally(attention: ir.Node, live: list[ir.Value], lengths: ir.Value) -> None:
    """Inputs of Attention-24: Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen."""
    attention.resize_inputs(7)
    for index, value in {1: live[0], 2: live[1], 3: None, 6: lengths}.items():
        attention.replace_input_with(index, value)
    attention.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
