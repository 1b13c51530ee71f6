"""The head on chosen rows: the same logits, fewer of them."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.passes.gather_rows import gather_rows
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

B, S, H, V = 2, 3, 64, 10
GRAPH = """
slice (float[B,S,{h}] hidden, float[{h}] weight, float[{v},{h}] lm_head) => (float[B,S,{v}] logits)
<int64[1] places = {{1}}>
{{
  {before}
  normal = RMSNormalization <axis = {axis}, epsilon = 0.00001> ({source}, weight)
  turned = Transpose <perm = [1, 0]> (lm_head)
  logits = MatMul(normal, turned)
}}
"""

MEAN = "mean = ReduceMean <keepdims = 1> (hidden, places) mixed = Sub(hidden, mean)"


def head(before: str = "", source: str = "hidden", axis: int = -1) -> ir.Model:
    return parse(GRAPH.format(h=H, v=V, before=before, source=source, axis=axis))


@pytest.mark.parametrize("rows", [[2, 5], [0], [5, 4, 3, 2, 1, 0], [1, 1]])
def test_gathers_and_computes_the_same(rows: list[int]) -> None:
    model = head()
    feeds = {"hidden": normal(0, B, S, H), "weight": normal(1, H), "lm_head": normal(2, V, H)}
    expected = run_ort(model, feeds)["logits"].reshape(-1, V)[rows]
    part = piece(model, "head")
    assert gather_rows(part, context()).fired == 1
    assert operators(model) == {"Reshape": 1, "Gather": 1, "RMSNormalization": 1, "Transpose": 1, "MatMul": 1}
    feeds["rows"] = np.array(rows)
    # Another number of rows may take another matrix kernel: the same sum in another order.
    assert_same(run_ort(model, feeds), {"logits": expected})
    assert_same(run_reference(model, feeds), {"logits": expected})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: head("mean = ReduceMean <keepdims = 1> (hidden, places) mixed = Sub(hidden, mean)", "mixed"),
            "ReduceMean",
        ),
        (lambda: head(axis=1), "RMSNormalization"),
        (lambda: head("mixed = Transpose <perm = [1, 0, 2]> (hidden)", "mixed"), "Transpose"),
    ],
    ids=["mean over positions", "norm over positions", "positions transposed"],
)
def test_leaves_a_near_miss_untouched(model, reason: str) -> None:
    graph = model()
    before = operators(graph)
    outcome = gather_rows(piece(graph, "head"), context())
    assert outcome.fired == 0
    assert operators(graph) == before
    assert [value.name for value in graph.graph.inputs] == ["hidden", "weight", "lm_head"]
    assert reason in outcome.why_not
