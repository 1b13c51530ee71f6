"""RotaryEmbedding: fused with tables of the graph's own frequencies, left alone for any other rotation."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.core.canonical import RotaryTable, Slice
from exporter.core.errors import BudgetError
from exporter.passes.fuse_rope import fuse_rope
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

B, HEADS, S, D = 2, 4, 3, 16
ANGLES = """
  positions = Unsqueeze({positions}, two)
  floats = Cast <to = 1> (positions)
  angle = Mul(floats, frequencies)
  both = Concat <axis = -1> ({halves})
  cos = {cos}(both)
  cos_scaled = Mul(cos, scale)
  cos_heads = Unsqueeze(cos_scaled, {heads_axis})
  sin = Sin({sin_of})
  sin_scaled = Mul(sin, scale)
  sin_heads = Unsqueeze(sin_scaled, {heads_axis})
"""
ROTATION = """
  low = Slice(x, {low}, last, step)
  high = Slice(x, {high}, last, step)
  negated = Neg({negated})
  turned = Concat <axis = -1> ({turned})
  kept = Mul(x, cos_heads)
  moved = Mul(turned, sin_heads)
  y = Add({sum})
"""
DEFAULTS = {
    "positions": "position_ids",
    "halves": "angle, angle",
    "cos": "Cos",
    "sin_of": "both",
    "heads_axis": "one",
    "low": "zero, half",
    "high": "half, end",
    "negated": "high",
    "turned": "negated, low",
    "sum": "kept, moved",
    "scale": "1.0",
}


def rope(**changes: str) -> ir.Model:
    """A rotation of x [B, heads, S, D]; its frequencies are those of the tiny config."""
    names = {**DEFAULTS, **changes}
    frequencies = context().config.rope.inverse_frequencies(D)
    model = parse(f"""
slice (float[{B},{HEADS},{S},{D}] x, int64[{B},{S}] position_ids, int64[{B},{S}] others)
  => (float[{B},{HEADS},{S},{D}] y)
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] last = {{3}}, int64[1] step = {{1}},
 int64[1] half = {{8}}, int64[1] odd = {{6}}, int64[1] end = {{9223372036854775807}},
 float scale = {{{names["scale"]}}},
 float[8] frequencies = {{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0}}>
{{ {ANGLES.format(**names)} {ROTATION.format(**names)} }}""")
    model.graph.initializers["frequencies"].const_value = ir.tensor(frequencies, name="frequencies")
    return model


def feeds() -> dict[str, np.ndarray]:
    positions = np.array([[0, 1, 2], [7, 19, 31]])
    return {"x": normal(0, B, HEADS, S, D), "position_ids": positions, "others": positions + 1}


def with_tables(part: Slice) -> dict[str, np.ndarray]:
    tables = {name: weight.values() for name, weight in part.weights.items() if isinstance(weight, RotaryTable)}
    return {**feeds(), **tables}


@pytest.mark.parametrize("scale", ["1.0", "0.75"])
def test_fuses_and_computes_the_same(scale: str) -> None:
    model = rope(scale=scale)
    expected = run_ort(model, feeds())
    part = piece(model)
    assert fuse_rope(part, context()).fired == 1
    assert operators(model) == {"RotaryEmbedding": 1}
    assert model.graph[0].outputs[0].name == "y"
    table = part.weights["rotary.cos_cache"]
    assert isinstance(table, RotaryTable)
    assert (table.function, table.length, table.scale) == ("cos", 32, float(scale))
    assert table.inverse_frequencies == tuple(float(f) for f in context().config.rope.inverse_frequencies(D))
    assert_same(run_ort(model, with_tables(part)), expected)
    assert_same(run_reference(model, with_tables(part)), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"negated": "low", "turned": "high, negated"}, ""),
        ({"turned": "low, negated"}, ""),
        ({"low": "zero, odd", "high": "odd, end"}, "a half is [0]:[6]"),
        ({"halves": "angle, floats"}, "interleaved"),
        ({"cos": "Sin"}, "not a Cos"),
        ({"sin_of": "angle"}, ""),
        ({"positions": "others"}, "position_ids"),
        ({"heads_axis": "two"}, "axis 1"),
    ],
    ids=[
        "the other half negated",
        "halves not exchanged",
        "unequal halves",
        "angles of the halves differ",
        "sin for cos",
        "sin of half the angles",
        "other positions",
        "broadcast over the wrong axis",
    ],
)
def test_leaves_a_near_miss_untouched(changes: dict[str, str], reason: str) -> None:
    model = rope(**changes)
    before = operators(model)
    part = piece(model)
    outcome = fuse_rope(part, context())
    assert outcome.fired == 0
    assert operators(model) == before
    assert not part.weights
    assert [value.name for value in model.graph.inputs] == ["x", "position_ids", "others"]
    assert reason in outcome.why_not


def test_leaves_interleaved_pairs_untouched() -> None:
    model = rope()
    model.graph.initializers["step"].const_value = ir.tensor(np.array([2]), name="step")
    outcome = fuse_rope(piece(model), context())
    assert outcome.fired == 0
    assert "[0]:[8]:[2] of axis" in outcome.why_not


def test_refuses_frequencies_that_the_config_does_not_have() -> None:
    model = rope()
    with pytest.raises(BudgetError, match=r"differ from config\.json's") as caught:
        fuse_rope(piece(model), context(rope_theta=20000.0))
    assert caught.value.kind == "fuse.rotary"
