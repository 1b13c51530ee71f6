"""Attention: fused with its heads grouped, left alone when anything but a mask or a scale in its place differs."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.passes.fuse_attention import fuse_attention
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

B, S, T, D = 2, 3, 5, 8
REPEAT = """
  {part}_wide = Unsqueeze({part}, {axis})
  {part}_times = Expand({part}_wide, {times})
  {part}_all = Reshape({part}_times, heads)
"""
ATTEND = """
  turned = Transpose <perm = {perm}> ({k})
  scores = MatMul(q, turned)
  scaled = {scaling}(scores, scale)
  masked = Add({masked})
  weights = Softmax <axis = {axis}> (masked)
  y = MatMul(weights, {v})
"""
DEFAULTS = {"perm": "[0, 1, 3, 2]", "scaling": "Mul", "masked": "scaled, attention_mask", "axis": "-1"}


def attention(kv_heads: int = 2, repeat_axis: str = "two", times: str = "times", **changes: str) -> ir.Model:
    """Attention of 4 query heads over `kv_heads` heads, repeated where they are fewer."""
    repeated = kv_heads != 4
    repeat = "".join(REPEAT.format(part=part, axis=repeat_axis, times=times) for part in "kv") if repeated else ""
    names = {**DEFAULTS, "k": "k_all" if repeated else "k", "v": "v_all" if repeated else "v", **changes}
    model = parse(f"""
slice (float[{B},4,{S},{D}] q, float[{B},{kv_heads},{T},{D}] k, float[{B},{kv_heads},{T},{D}] v,
       float[{B},1,{S},{T}] attention_mask, float[{B},4,{S},{T}] other) => (float[{B},4,{S},{D}] y)
<int64[1] one = {{1}}, int64[1] two = {{2}}, float scale = {{0.35355338}},
 int64[5] times = {{1, 1, {4 // kv_heads}, 1, 1}}, int64[5] tiled = {{1, {4 // kv_heads}, 1, 1, 1}},
 int64[4] heads = {{0, 4, -1, {D}}}>
{{ {repeat} {ATTEND.format(**names)} }}""")
    shapes = {"q": [B, 4, S, D], "k": [B, kv_heads, T, D], "v": [B, kv_heads, T, D]}
    for value in model.graph.inputs:
        value.shape = ir.Shape(shapes.get(value.name or "", list(value.shape or [])))
    return model


def feeds(kv_heads: int = 2) -> dict[str, np.ndarray]:
    causal = np.where(np.arange(T) <= np.arange(S)[:, None] + T - S, 0, np.finfo(np.float32).min)
    return {
        "q": normal(0, B, 4, S, D),
        "k": normal(1, B, kv_heads, T, D),
        "v": normal(2, B, kv_heads, T, D),
        "attention_mask": np.broadcast_to(causal.astype(np.float32), (B, 1, S, T)).copy(),
        "other": normal(3, B, 4, S, T),
    }


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["one head for all", "grouped", "as many heads"])
def test_fuses_and_computes_the_same(kv_heads: int) -> None:
    model = attention(kv_heads)
    expected = run_ort(model, feeds(kv_heads))
    assert fuse_attention(piece(model), context()).fired == 1
    assert operators(model) == {"Attention": 1}
    node = model.graph[0]
    assert [value.name if value else None for value in node.inputs] == ["q", "k", "v", "attention_mask"]
    assert node.attributes["scale"].as_float() == pytest.approx(0.35355338)
    assert node.outputs[0].name == "y"
    assert_same(run_ort(model, feeds(kv_heads)), expected)
    assert_same(run_reference(model, feeds(kv_heads)), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"masked": "scores, attention_mask"}, ""),
        ({"masked": "scaled, other"}, "not attention_mask"),
        ({"axis": "2"}, ""),
        ({"scaling": "Add"}, ""),
        ({"perm": "[0, 1, 2, 3]"}, ""),
        ({"repeat_axis": "one", "times": "tiled"}, "axis [1]"),
    ],
    ids=[
        "no scale",
        "a bias that is no mask",
        "softmax over queries",
        "shifted scores",
        "not transposed",
        "tiled heads",
    ],
)
def test_leaves_a_near_miss_untouched(changes: dict[str, str], reason: str) -> None:
    model = attention(2, **changes)
    before = operators(model)
    outcome = fuse_attention(piece(model), context())
    assert outcome.fired == 0
    assert operators(model) == before
    assert reason in outcome.why_not


def test_leaves_a_scale_after_the_mask() -> None:
    late = "masked_first = Add(scores, attention_mask)\n  masked = Mul(masked_first, scale)"
    text = ATTEND.replace("scaled = {scaling}(scores, scale)\n  masked = Add({masked})", late)
    model = attention(4)
    names = {**DEFAULTS, "k": "k", "v": "v"}
    scaled_late = parse(f"""
slice (float[{B},4,{S},{D}] q, float[{B},4,{T},{D}] k, float[{B},4,{T},{D}] v, float[{B},1,{S},{T}] attention_mask)
  => (float[{B},4,{S},{D}] y) <float scale = {{0.35}}> {{ {text.format(**names)} }}""")
    assert fuse_attention(piece(scaled_late), context()).fired == 0
    assert fuse_attention(piece(model), context()).fired == 1


def test_leaves_a_scale_that_is_no_constant() -> None:
    model = attention(4)
    scale = model.graph.initializers.pop("scale")
    scale.const_value = None
    model.graph.inputs.append(scale)
    outcome = fuse_attention(piece(model), context())
    assert outcome.fired == 0
    assert "constant" in outcome.why_not
