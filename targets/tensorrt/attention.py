"""Rotation, cache and attention: native layers of TensorRT around values in half precision.

Queries and keys are rotated in float32 and rounded once. TensorScatter from a network input to a network output
becomes KV_CACHE_UPDATE. `scale` stays an attribute: queries scaled beforehand, with `scale` 1, make TensorRT-RTX 1.7
copy one of the caches in every step (its builder's list of layers shows a Move of the whole cache).
"""

import onnx_ir as ir

from targets.slice_weights import constant_integers
from targets.tensorrt.lowering import SliceLowering

POSITIONS_AXIS = 2
CAUSAL_ONLY = (3, 4, 5)
"""Inputs of Attention that a canonical one leaves out: mask, past key, past value."""


def rotary_embedding(low: SliceLowering, node: ir.Node) -> None:
    """Rotate heads [B, heads, S, D] in float32."""
    positions = node.inputs[3] if len(node.inputs) > 3 else None
    _is_input(low, positions, "position_ids")
    low.copy(node, "self_attn.rotary_embedding")


def tensor_scatter(low: SliceLowering, node: ir.Node) -> None:
    """Write new keys or values [B, Hkv, S, D] into a cache; without a cache they are all there is."""
    past, update, rows = node.inputs[:3]
    axis, mode = node.attributes.get_int("axis", -2), node.attributes.get_string("mode", "linear")
    if axis not in (-2, POSITIONS_AXIS) or mode != "linear":
        raise low.refuse(f"TensorScatter writes along axis {axis} in mode {mode}")
    which = _past_name(low, past)
    _is_input(low, rows, "write_indices")
    fresh = low.graph.cast(low.tensor(update), low.half, f"{low.prefix}self_attn.new_{which}")
    if low.step.write_indices is None:
        low.values[node.outputs[0]] = fresh
        return
    inputs = [low.tensor(past), fresh, low.step.write_indices]
    attributes: dict[str, int | float | str] = {"axis": POSITIONS_AXIS, "mode": "linear"}
    low.values[node.outputs[0]] = low.graph.make(
        "TensorScatter", inputs, f"{low.prefix}self_attn.{which}_cache", attributes={**attributes}
    )


def longest_row(low: SliceLowering, node: ir.Node) -> None:
    """How far the longest row reaches: only a Slice asks, which is left out."""
    _is_input(low, node.inputs[0], "nonpad_kv_seqlen")


def live_positions(low: SliceLowering, node: ir.Node) -> None:
    """Attention sees the whole cache here, through its mask: a shape that depends on data would hinder recording."""
    source, longest = node.inputs[0], node.inputs[2].producer() if node.inputs[2] is not None else None
    if longest is None or longest.op_type != "ReduceMax" or source is None:
        raise low.refuse("Slice of something else than a cache")
    starts, axes = constant_integers(node.inputs[1]), constant_integers(node.inputs[3])
    if (starts, axes) != ((0,), (POSITIONS_AXIS,)):
        raise low.refuse(f"a cache is sliced from {starts} along axes {axes}")
    low.values[node.outputs[0]] = low.tensor(source)


def attention(low: SliceLowering, node: ir.Node) -> None:
    """Attention in half precision, [B, heads, S, D]; what it sees is in the mask, or all up to itself."""
    causal = node.attributes.get_int("is_causal", 0)
    extra = [position for position in CAUSAL_ONLY if len(node.inputs) > position and node.inputs[position] is not None]
    if causal != 1 or extra:
        raise low.refuse(f"Attention with is_causal {causal} and the inputs {extra}")
    _is_input(low, node.inputs[6] if len(node.inputs) > 6 else None, "nonpad_kv_seqlen")
    name = f"{low.prefix}self_attn.attention"
    query = low.graph.cast(low.tensor(node.inputs[0]), low.half, f"{low.prefix}self_attn.query")
    inputs = [query, low.tensor(node.inputs[1]), low.tensor(node.inputs[2])]
    attributes: dict[str, int | float | str] = {"is_causal": int(low.step.mask is None)}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale", 1.0)
    if low.step.mask is not None:
        inputs.append(low.step.mask)
    low.values[node.outputs[0]] = low.graph.make("Attention", inputs, name, attributes={**attributes})


def _past_name(low: SliceLowering, value: ir.Value | None) -> str:
    """`key` or `value`."""
    name = str(value.name) if value is not None and value.is_graph_input() else ""
    if name not in ("past_key", "past_value"):
        raise low.refuse(f"TensorScatter writes into {value.name if value else None}, not into a cache")
    return name.removeprefix("past_")


def _is_input(low: SliceLowering, value: ir.Value | None, name: str) -> None:
    found = value.name if value is not None else None
    if value is None or not value.is_graph_input() or found != name:
        raise low.refuse(f"{found} stands for {name}")
