"""Swish: fused for x * sigmoid(x) and nothing else."""

import pytest

from exporter.passes.fuse_swish import fuse_swish
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

GRAPH = "slice (float[2,8] x, float[2,8] z) => (float[2,8] y) {{ gate = {gate}({source}) y = Mul({product}) }}"
FEEDS = {"x": normal(0, 2, 8), "z": normal(1, 2, 8)}


@pytest.mark.parametrize("product", ["x, gate", "gate, x"])
def test_fuses_and_computes_the_same(product: str) -> None:
    model = parse(GRAPH.format(gate="Sigmoid", source="x", product=product))
    expected = run_ort(model, FEEDS)
    assert fuse_swish(piece(model), context()).fired == 1
    assert operators(model) == {"Swish": 1}
    assert model.graph[0].outputs[0].name == "y"
    assert_same(run_ort(model, FEEDS), expected)
    assert_same(run_reference(model, FEEDS), expected)


@pytest.mark.parametrize(
    ("gate", "source", "product"),
    [("Relu", "x", "x, gate"), ("Sigmoid", "z", "x, gate"), ("Tanh", "x", "x, gate")],
    ids=["gate times relu", "sigmoid of another value", "tanh"],
)
def test_leaves_a_near_miss_untouched(gate: str, source: str, product: str) -> None:
    model = parse(GRAPH.format(gate=gate, source=source, product=product))
    before = operators(model)
    assert fuse_swish(piece(model), context()).fired == 0
    assert operators(model) == before


def test_leaves_another_operator_than_a_product() -> None:
    model = parse(GRAPH.format(gate="Sigmoid", source="x", product="x, gate").replace("Mul", "Add"))
    assert fuse_swish(piece(model), context()).fired == 0
