"""RMSNormalization: fused where it is one, left alone where it only looks like one."""

import onnx_ir as ir
import pytest

from exporter.passes.fuse_rms_norm import fuse_rms_norm
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

GRAPH = """
slice (float[2,3,8] x, float[8] weight) => (float[2,3,8] y)
<float two = {{{exponent}}}, int64[1] axes = {{{axes}}}, float epsilon = {{{epsilon}}}>
{{
  square = Pow({squared}, two)
  mean = ReduceMean <keepdims = {keepdims}> (square, axes)
  shifted = Add(mean, epsilon)
  root = Sqrt(shifted)
  inverse = Reciprocal(root)
  scaled = Mul({normalised}, inverse)
  y = Mul({product})
}}
"""
DEFAULTS = {
    "exponent": "2.0",
    "axes": "-1",
    "epsilon": "0.00001",
    "squared": "x",
    "normalised": "x",
    "keepdims": "1",
    "product": "scaled, weight",
}
FEEDS = {"x": normal(0, 2, 3, 8), "weight": normal(1, 8)}


def rms_norm(**changes: str) -> ir.Model:
    return parse(GRAPH.format(**{**DEFAULTS, **changes}))


@pytest.mark.parametrize("product", ["scaled, weight", "weight, scaled"])
def test_fuses_and_computes_the_same(product: str) -> None:
    model = rms_norm(product=product)
    expected = run_ort(model, FEEDS)
    outcome = fuse_rms_norm(piece(model), context())
    assert outcome.fired == 1
    assert operators(model) == {"RMSNormalization": 1}
    node = model.graph[0]
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-5, rel=1e-7)
    assert node.outputs[0].name == "y"
    assert_same(run_ort(model, FEEDS), expected)
    assert_same(run_reference(model, FEEDS), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axes": "1"}, "axes [1]"),
        ({"axes": "0"}, "axes [0]"),
        ({"exponent": "3.0"}, "exponent"),
        ({"epsilon": "-0.5"}, "epsilon"),
        ({"keepdims": "0", "axes": "-1"}, ""),
    ],
    ids=["another axis", "batch axis", "another exponent", "negative epsilon", "axis dropped"],
)
def test_leaves_a_near_miss_untouched(changes: dict[str, str], reason: str) -> None:
    model = rms_norm(**changes)
    before = operators(model)
    outcome = fuse_rms_norm(piece(model), context())
    assert outcome.fired == 0
    assert operators(model) == before
    assert reason in outcome.why_not


def test_leaves_layer_norm_untouched() -> None:
    model = parse("""
slice (float[2,3,8] x, float[8] weight) => (float[2,3,8] y)
<float two = {2.0}, int64[1] axes = {-1}, float epsilon = {0.00001}>
{
  centre = ReduceMean <keepdims = 1> (x, axes)
  centred = Sub(x, centre)
  square = Pow(centred, two)
  mean = ReduceMean <keepdims = 1> (square, axes)
  shifted = Add(mean, epsilon)
  root = Sqrt(shifted)
  inverse = Reciprocal(root)
  scaled = Mul(x, inverse)
  y = Mul(scaled, weight)
}""")
    before = operators(model)
    assert fuse_rms_norm(piece(model), context()).fired == 0
    assert operators(model) == before


def test_leaves_a_weight_that_is_no_vector() -> None:
    model = parse(GRAPH.format(**DEFAULTS).replace("float[8] weight", "float[3,8] weight"))
    outcome = fuse_rms_norm(piece(model), context())
    assert outcome.fired == 0
    assert "vector" in outcome.why_not


def test_leaves_a_value_that_is_used_elsewhere() -> None:
    text = GRAPH.format(**DEFAULTS).replace("(float[2,3,8] y)", "(float[2,3,8] y, float[2,3,1] inverse)")
    model = parse(text)
    assert fuse_rms_norm(piece(model), context()).fired == 0
