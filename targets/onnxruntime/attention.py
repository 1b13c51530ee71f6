"""From the canonical attention group to one GroupQueryAttention with rotary embedding and cache inside.

The group, all of it checked: Split(q, k, v) -> Reshape -> Transpose -> RotaryEmbedding (q, k) -> TensorScatter
(k, v) -> Slice to ReduceMax(nonpad_kv_seqlen) -> Attention -> Transpose -> Reshape.
"""

from dataclasses import dataclass

import onnx_ir as ir

from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.lowering import SliceLowering
from targets.slice_weights import constant_integers

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class CacheInputs:
    """The engine's inputs of attention: past keys and values of a layer, seqlens_k int32 [B] (positions after this
    step, less one) and total_sequence_length int32 (the batch's longest row after this step).

    `scales`, float [1] each, are those of an int8 cache's keys and values."""

    past_key: ir.Value
    past_value: ir.Value
    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    scales: tuple[ir.Value, ir.Value] | None = None

    @property
    def quantization(self) -> dict[str, int | str]:
        """Attributes of GroupQueryAttention that say how the cache is stored."""
        if self.scales is None:
            return {}
        return {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


@dataclass(frozen=True)
class AttentionGroup:
    """What a canonical attention group computes, and the nodes that it is made of."""

    packed: ir.Value
    tables: tuple[ir.Value, ir.Value]
    output: ir.Value
    presents: tuple[ir.Value, ir.Value]
    heads: int
    kv_heads: int
    scale: float
    causal: int
    interleaved: int
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class _Heads:
    """One part of the packed projection, split into heads [B, heads, S, head_dim]."""

    split: ir.Node
    index: int
    count: int
    head_dim: int


class _Matcher:
    """Walks from an Attention node to its ends; every deviation is refused with what was found."""

    def __init__(self, low: SliceLowering) -> None:
        self._low = low
        self.nodes: set[ir.Node] = set()

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise self._low.refuse(f"attention group: {what}")

    def producer(self, value: ir.Value | None, kind: str) -> ir.Node:
        node = None if value is None else value.producer()
        if node is None or node.op_type != kind:
            name, found = value.name if value else None, node.op_type if node else "an input"
            raise self._low.refuse(f"attention group: {name} comes from {found}, expected {kind}")
        self.nodes.add(node)
        return node

    def consumer(self, value: ir.Value, kind: str) -> ir.Node:
        users = list(value.consumers())
        found = ", ".join(user.op_type for user in users)
        self.expect(len(users) == 1 and users[0].op_type == kind, f"{value.name} goes to {found}, expected {kind}")
        self.nodes.add(users[0])
        return users[0]

    def permutation(self, node: ir.Node) -> None:
        perm = tuple(node.attributes.get_ints("perm", ()))
        self.expect(perm == HEADS_FIRST, f"Transpose permutes {perm}, expected {HEADS_FIRST}")

    def heads(self, value: ir.Value | None) -> _Heads:
        transpose = self.producer(value, "Transpose")
        self.permutation(transpose)
        reshape = self.producer(transpose.inputs[0], "Reshape")
        shape = constant_integers(reshape.inputs[1])
        self.expect(len(shape) == 4 and shape[:2] == (0, 0), f"heads are reshaped to {shape}")
        split = self.producer(reshape.inputs[0], "Split")
        assert reshape.inputs[0] is not None
        return _Heads(split, split.outputs.index(reshape.inputs[0]), shape[2], shape[3])

    def rotary(self, value: ir.Value | None) -> ir.Node:
        node = self.producer(value, "RotaryEmbedding")
        positions = node.inputs[3] if len(node.inputs) > 3 else None
        self.expect(positions is not None and positions.name == "position_ids", "rotary positions are not position_ids")
        self.expect(node.attributes.get_int("rotary_embedding_dim", 0) == 0, "rotary embedding is partial")
        return node

    def cache(self, value: ir.Value | None, past: str) -> ir.Node:
        """The TensorScatter behind a Slice to the longest row."""
        live = self.producer(value, "Slice")
        self.expect(constant_integers(live.inputs[1]) == (0,), "the cache is not sliced from its start")
        self.expect(constant_integers(live.inputs[3]) == (2,), "the cache is not sliced along its positions")
        longest = self.producer(live.inputs[2], "ReduceMax")
        self.is_input(longest.inputs[0], "nonpad_kv_seqlen")
        scatter = self.producer(live.inputs[0], "TensorScatter")
        axis = scatter.attributes.get_int("axis", -2)
        self.expect(axis in (-2, 2), f"TensorScatter writes along axis {axis}")
        mode = scatter.attributes.get_string("mode", "linear")
        self.expect(mode == "linear", f"TensorScatter writes in mode {mode}")
        self.is_input(scatter.inputs[0], past)
        self.is_input(scatter.inputs[2], "write_indices")
        return scatter

    def is_input(self, value: ir.Value | None, name: str) -> None:
        found = value.name if value is not None else None
        self.expect(value is not None and value.is_graph_input() and found == name, f"{found} stands for {name}")


def match_attention(low: SliceLowering, node: ir.Node) -> AttentionGroup:
    """The group around an Attention node. Raises UnsupportedError naming what deviates."""
    match = _Matcher(low)
    match.nodes.add(node)
    query = match.rotary(node.inputs[0])
    key_cache, value_cache = match.cache(node.inputs[1], "past_key"), match.cache(node.inputs[2], "past_value")
    key = match.rotary(key_cache.inputs[1])
    parts = [match.heads(v) for v in (query.inputs[0], key.inputs[0], value_cache.inputs[1])]
    _check_parts(match, parts)
    for position in (3, 4, 5):
        match.expect(len(node.inputs) <= position or node.inputs[position] is None, "Attention has a mask or a past")
    match.is_input(node.inputs[6] if len(node.inputs) > 6 else None, "nonpad_kv_seqlen")
    match.expect(list(query.inputs[1:3]) == list(key.inputs[1:3]), "query and key use different rotary tables")
    interleaved = query.attributes.get_int("interleaved", 0)
    match.expect(interleaved == key.attributes.get_int("interleaved", 0), "query and key rotate differently")
    merged = match.consumer(node.outputs[0], "Transpose")
    match.permutation(merged)
    output = match.consumer(merged.outputs[0], "Reshape").outputs[0]
    cos, sin = query.inputs[1:3]
    packed = parts[0].split.inputs[0]
    assert packed is not None and cos is not None and sin is not None
    return AttentionGroup(
        packed=packed,
        tables=(cos, sin),
        output=output,
        presents=(key_cache.outputs[0], value_cache.outputs[0]),
        heads=parts[0].count,
        kv_heads=parts[1].count,
        scale=node.attributes.get_float("scale", parts[0].head_dim ** -0.5),
        causal=node.attributes.get_int("is_causal", 0),
        interleaved=interleaved,
        nodes=frozenset(match.nodes),
    )


def _check_parts(match: _Matcher, parts: list[_Heads]) -> None:
    """q, k and v are the three parts of one Split along the last axis, as wide as their heads."""
    split = parts[0].split
    match.expect(all(part.split is split for part in parts), "q, k and v come from different Splits")
    match.expect([part.index for part in parts] == [0, 1, 2], "q, k and v are split in another order")
    axis = split.attributes.get_int("axis", 0)
    match.expect(axis in (-1, 2), f"q, k and v are split along axis {axis}")
    widths = constant_integers(split.inputs[1])
    expected = tuple(part.count * part.head_dim for part in parts)
    match.expect(widths == expected, f"q, k and v are {widths} wide, their heads need {expected}")
    match.expect(parts[1].count == parts[2].count, "keys and values have different heads")


def emit_attention(low: SliceLowering, group: AttentionGroup, cache: CacheInputs) -> None:
    """Write the GroupQueryAttention of a group; present keys and values are its second and third output."""
    index = low.slice.index
    tables = [low.tensor(table) for table in group.tables]
    name = f"{low.prefix}self_attn.attention"
    presents = [f"present.{index}.key", f"present.{index}.value"]
    attended = low.graph.op(
        "GroupQueryAttention",
        [
            low.tensor(group.packed), None, None,
            cache.past_key, cache.past_value, cache.seqlens_k, cache.total_sequence_length, *tables,
            *([None, None, None, *cache.scales] if cache.scales else []),
        ],
        name,
        domain=MICROSOFT,
        outputs=[f"{name}.out", *presents],
        attributes={
            "num_heads": group.heads,
            "kv_num_heads": group.kv_heads,
            "scale": group.scale,
            "do_rotary": 1,
            "rotary_interleaved": group.interleaved,
            **({} if group.causal else {"causal": 0}),
            **cache.quantization,
        },
    )  # fmt: skip
    low.values[group.output] = attended
    for value, present in zip(group.presents, low.graph.last_node.outputs[1:], strict=True):
        low.values[value] = present
