"""How the operators of the attention group are lowered, one small function each."""

from dataclasses import replace

import onnx_ir as ir

from targets.tvm.lower.checks import check_attributes, check_inputs, constant_integers
from targets.tvm.lower.slice_lowering import SliceLowering
from targets.tvm.lower.values import Attended, Cached, Heads, LongestRow, Part, StepInput, WeightRef

HEADS_FIRST = (0, 2, 1, 3)


def reshape(low: SliceLowering, x: Part | Attended, shape: tuple[int, ...]) -> Heads | Attended:
    """A part of the packed projection becomes heads; attended heads are merged again."""
    if isinstance(x, Part):
        if len(shape) != 4 or shape[:2] != (0, 0) or shape[2] * shape[3] != x.widths[x.index]:
            raise low.refuse(f"a part of {x.widths[x.index]} columns is reshaped to {list(shape)}")
        return Heads(x, shape[2], shape[3])
    if x.merged or x.heads_first or shape != (0, 0, x.query.heads * x.query.head_dim):
        raise low.refuse(f"attention's output is reshaped to {list(shape)}")
    return replace(x, merged=True)


def transpose(low: SliceLowering, x: Heads | Attended, perm: tuple[int, ...]) -> Heads | Attended:
    """Heads to the front, and back behind attention; the kernels need no copy for it."""
    forward = isinstance(x, Heads)
    if perm != HEADS_FIRST or x.heads_first == forward or (isinstance(x, Attended) and x.merged):
        raise low.refuse(f"Transpose permutes attention's heads by {perm}")
    return replace(x, heads_first=forward)


def rotary(low: SliceLowering, node: ir.Node) -> None:
    check_inputs(low, node, 4)
    check_attributes(low, node, interleaved=0, rotary_embedding_dim=0, num_heads=None)
    heads, cos, sin, positions = (low.lowered(value) for value in node.inputs[:4])
    if not isinstance(heads, Heads) or not heads.heads_first or heads.tables is not None:
        raise low.refuse("RotaryEmbedding of something else than heads of the packed projection")
    if positions != StepInput("position_ids"):
        raise low.refuse("rotary positions are not position_ids")
    for table, function in ((cos, "cos"), (sin, "sin")):
        if not isinstance(table, WeightRef) or getattr(table.weight, "function", "") != function:
            raise low.refuse(f"RotaryEmbedding's {function} is not a rotary table")
    low.values[node.outputs[0]] = replace(heads, tables=(cos, sin))


def scatter(low: SliceLowering, node: ir.Node) -> None:
    check_inputs(low, node, 3)
    check_attributes(low, node, axis=None, mode="linear")
    past, heads, write = (low.lowered(value) for value in node.inputs[:3])
    axis = node.attributes.get_int("axis", -2)
    if axis not in (-2, 2):
        raise low.refuse(f"TensorScatter writes along axis {axis}")
    if past not in (StepInput("past_key"), StepInput("past_value")) or write != StepInput("write_indices"):
        raise low.refuse(f"TensorScatter of {[value and value.name for value in node.inputs]}")
    if not isinstance(heads, Heads) or not heads.heads_first:
        raise low.refuse("TensorScatter of something else than heads of the packed projection")
    low.values[node.outputs[0]] = Cached(past.name, heads)


def longest(low: SliceLowering, node: ir.Node) -> None:
    check_inputs(low, node, 1)
    check_attributes(low, node, keepdims=1, noop_with_empty_axes=0)
    if low.lowered(node.inputs[0]) != StepInput("nonpad_kv_seqlen"):
        raise low.refuse("ReduceMax of something else than nonpad_kv_seqlen")
    low.values[node.outputs[0]] = LongestRow()


def cut(low: SliceLowering, node: ir.Node) -> None:
    """The cache up to the longest row: attention reads no further anyway."""
    cache, end = low.lowered(node.inputs[0]), low.lowered(node.inputs[2])
    if not isinstance(cache, Cached) or cache.live or end != LongestRow():
        raise low.refuse("Slice of something else than the cache to its longest row")
    steps = constant_integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
    found = (constant_integers(node.inputs[1]), constant_integers(node.inputs[3]), steps)
    if found not in (((0,), (2,), (1,)), ((0,), (-2,), (1,))):
        raise low.refuse(f"the cache is sliced from, along and in steps of {found}")
    low.values[node.outputs[0]] = replace(cache, live=True)


def attend(low: SliceLowering, node: ir.Node) -> None:
    check_attributes(
        low, node, is_causal=1, scale=None, softcap=0.0, qk_matmul_output_mode=0, q_num_heads=None,
        kv_num_heads=None, softmax_precision=None,
    )  # fmt: skip
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value = (low.lowered(each) for each in inputs[:3])
    if inputs[3:6] != [None] * 3 or low.lowered(inputs[6]) != StepInput("nonpad_kv_seqlen"):
        raise low.refuse("Attention has a mask or a past, or other lengths than nonpad_kv_seqlen")
    _check_operands(low, query, key, value)
    scale = node.attributes.get_float("scale", query.head_dim**-0.5)
    low.values[node.outputs[0]] = Attended(query, key, value, scale)


def _check_operands(low: SliceLowering, query: object, key: object, value: object) -> None:
    """Rotated queries and keys and plain values, the three parts of one product in this order."""
    if not isinstance(query, Heads) or not isinstance(key, Cached) or not isinstance(value, Cached):
        raise low.refuse("Attention of something else than queries and the cache")
    if not (key.live and value.live) or (key.past, value.past) != ("past_key", "past_value"):
        raise low.refuse(f"keys and values come from {key.past} and {value.past}")
    if query.tables is None or key.heads.tables is None:
        raise low.refuse("queries or keys are not rotated, expected RotaryEmbedding")
    if query.tables != key.heads.tables or value.heads.tables is not None:
        raise low.refuse("queries and keys are rotated by different tables, or values are")
    parts = [query.part, key.heads.part, value.heads.part]
    if [(part.index, len(part.widths)) for part in parts] != [(0, 3), (1, 3), (2, 3)]:
        raise low.refuse("queries, keys and values are not the three parts of one Split in this order")
    if any(part.product != query.part.product or part.widths != query.part.widths for part in parts):
        raise low.refuse("queries, keys and values come from different products")
    shapes = [(heads.heads, heads.head_dim) for heads in (query, key.heads, value.heads)]
    if shapes[1] != shapes[2] or shapes[0][1] != shapes[1][1]:
        raise low.refuse(f"queries, keys and values have heads of {shapes}")
