"""Passes that only bring graphs to one form: shapes folded, no-ops removed, operands in order."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.core.canonical import CheckpointWeight
from exporter.passes.fold_shapes import fold_shapes
from exporter.passes.order_operands import order_operands
from exporter.passes.remove_no_ops import remove_no_ops
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

SPLIT_HEADS = """
slice (float[B,S,12] x, float[B,2,P,4] past) => (float[B,S,3,4] y, float[B,2,T,4] joined, float[B,6,T,4] wide)
<int64 zero = {0}, int64 first = {1}, int64[1] axis = {0}, int64[1] minus = {-1}, int64[1] four = {4},
 int64[1] six = {6},
 int64[1] two = {2}, int64[1] three = {3}, int64[5] ones = {-1, -1, -1, -1, -1}>
{
  shape = Shape(x)
  b0 = Gather(shape, zero)
  b = Unsqueeze(b0, axis)
  s0 = Gather(shape, first)
  s = Unsqueeze(s0, axis)
  target = Concat <axis = 0> (b, s, minus, four)
  y = Reshape <allowzero = 0> (x, target)
  heads = Slice(y, axis, two, two)
  new = Transpose <perm = [0, 2, 1, 3]> (heads)
  joined = Concat <axis = -2> (past, new)
  length = Shape <start = 2, end = 3> (joined)
  five = Unsqueeze(joined, two)
  all = Concat <axis = 0> (b, two, three, length, four)
  unknown = Equal(all, ones)
  repeat = Where(unknown, ones, all)
  expanded = Expand(five, repeat)
  flat = Concat <axis = 0> (b, six, length, four)
  wide = Reshape(expanded, flat)
}
"""


@pytest.mark.parametrize("past", [0, 5])
def test_folds_shape_computations_for_every_size(past: int) -> None:
    model = parse(SPLIT_HEADS)
    feeds = {"x": normal(0, 2, 3, 12), "past": normal(1, 2, 2, past, 4)}
    expected = run_ort(model, feeds)
    assert fold_shapes(piece(model), context()).fired > 0
    assert not operators(model).keys() & {"Shape", "Gather", "Equal", "Where"}
    constants = {
        node.outputs[0].name: node.inputs[1].const_value.numpy().tolist()
        for node in model.graph
        if node.op_type in ("Reshape", "Expand")
    }
    assert constants == {"y": [0, 0, 3, 4], "expanded": [1, 1, 3, 1, 1], "wide": [0, 6, -1, 4]}
    assert_same(run_ort(model, feeds), expected, 0)
    assert_same(run_reference(model, feeds), expected, 0)


def test_keeps_a_shape_that_depends_on_sizes_in_two_places() -> None:
    model = parse("""
slice (float[B,S,12] x) => (float[S,B,12] y) <int64[1] twelve = {12}>
{
  b = Shape <start = 0, end = 1> (x)
  s = Shape <start = 1, end = 2> (x)
  target = Concat <axis = 0> (s, b, twelve)
  y = Reshape(x, target)
}""")
    fold_shapes(piece(model), context())
    assert operators(model)["Shape"] == 2


def test_keeps_what_is_computed_from_data() -> None:
    model = parse("slice (int64[B,S] position_ids) => (int64[B,S] y) <int64 two = {2}> { y = Mul(position_ids, two) }")
    assert fold_shapes(piece(model), context()).fired == 0
    assert operators(model) == {"Mul": 1}


NO_OPS = """
slice (float[B,S,12] x) => (float[B,S,12] y)
<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}},
 int64[1] end = {{9223372036854775807}}, int64[3] ones = {{1, 1, 1}}, int64[3] twice = {{2, 1, 1}}>
{{ a = {node} y = Neg(a) }}
"""


@pytest.mark.parametrize(
    "node",
    [
        "Identity(x)",
        "Cast <to = 1> (x)",
        "Slice(x, zero, end, one, one)",
        "Slice(x, zero, end, two)",
        "Expand(x, ones)",
    ],
)
def test_removes_what_changes_nothing(node: str) -> None:
    model = parse(NO_OPS.format(node=node))
    feeds = {"x": normal(0, 2, 3, 12)}
    expected = run_ort(model, feeds)
    assert remove_no_ops(piece(model), context()).fired == 1
    assert operators(model) == {"Neg": 1}
    assert_same(run_ort(model, feeds), expected, 0)


@pytest.mark.parametrize(
    "node",
    [
        "Cast <to = 10> (x)",
        "Slice(x, one, end, one, one)",
        "Slice(x, zero, four, two)",
        "Slice(x, zero, end, one, two)",
        "Expand(x, twice)",
    ],
    ids=["another type", "start inside", "end inside", "every second", "repeats"],
)
def test_keeps_what_changes_something(node: str) -> None:
    model = parse(NO_OPS.format(node=node))
    before = operators(model)
    assert remove_no_ops(piece(model), context()).fired == 0
    assert operators(model) == before


def test_an_output_keeps_its_name_and_the_value_remembers_its_own() -> None:
    model = parse("slice (float[B,S,12] x) => (float[B,S,12] hidden) { a = Neg(x) hidden = Cast <to = 1> (a) }")
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    remove_no_ops(piece(model), context())
    (output,) = model.graph.outputs
    assert (output.name, output.producer().op_type, output.metadata_props["raw_name"]) == ("hidden", "Neg", "a")


def test_an_input_never_becomes_an_output() -> None:
    model = parse("slice (float[B,S,12] x) => (float[B,S,12] y) { y = Identity(x) }")
    assert remove_no_ops(piece(model), context()).fired == 0


def test_puts_weights_and_constants_second() -> None:
    model = parse("""
slice (float[2,4] x, float[2,4] z, float[4] bias) => (float[2,4] y) <float one = {1.0}, float two = {2.0}>
{ a = Add(bias, x) b = Mul(two, a) c = Div(one, b) d = Div(two, c) y = Add(z, d) }""")
    feeds = {"x": normal(0, 2, 4), "z": normal(1, 2, 4), "bias": normal(2, 4)}
    expected = run_ort(model, feeds)
    part = piece(model, weights={"bias": CheckpointWeight(("model.layers.0.bias",))})
    assert order_operands(part, context()).fired == 3
    order = [[value.name for value in node.inputs] for node in model.graph]
    assert order == [["x", "bias"], ["a", "two"], ["b"], ["two", "c"], ["z", "d"]]
    assert [node.op_type for node in model.graph] == ["Add", "Mul", "Reciprocal", "Div", "Add"]
    assert_same(run_ort(model, feeds), expected)


def test_leaves_integer_division() -> None:
    model = parse("slice (int64[2] x) => (int64[2] y) <int64 one = {1}> { y = Div(one, x) }")
    assert order_operands(piece(model), context()).fired == 0
    assert_same(run_ort(model, {"x": np.array([1, 2])}), {"y": np.array([1, 0])}, 0)
