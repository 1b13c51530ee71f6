"""The first node that fails, found with few attempts, by a stand-in for the builder that looks for bad nodes."""

from pathlib import Path

import onnx
import pytest

from targets.tensorrt.find_node import FailingNode, describe, failing_node
from tests.targets.tensorrt.typed_graphs import Decoder, save


class Attempts:
    """Fails on every prefix that holds the bad node, and checks that each is a whole graph."""

    def __init__(self, bad: str) -> None:
        self.bad, self.lengths = bad, list[int]()

    def __call__(self, prefix: bytes) -> str:
        model = onnx.load_from_string(prefix)
        graph = model.graph
        known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
        for node in graph.node:
            assert set(node.input) <= known, node.name
            known |= set(node.output)
        assert {value.name for value in graph.output} <= known
        self.lengths.append(len(graph.node))
        return "it is bad" if self.bad in [node.name for node in graph.node] else ""


@pytest.mark.parametrize(
    "bad", ["embed", "layers.0.q.matmul", "layers.0.value", "layers.1.attention", "layers.1.add", "lm_head.matmul"]
)
def test_the_bad_node_is_found(tmp_path: Path, bad: str) -> None:
    model = Decoder("fp8").model()
    attempt = Attempts(bad)
    found = failing_node(save(model, tmp_path), attempt)
    operator = next(node.op_type for node in model.graph.node if node.name == bad)
    assert found == FailingNode(bad, operator, "it is bad")
    assert len(attempt.lengths) <= 14 < len(model.graph.node)


def test_the_product_is_named_for_codes_that_fail(tmp_path: Path) -> None:
    """A prefix does not end at codes, so what takes them is named."""
    found = failing_node(save(Decoder("fp8").model(), tmp_path), Attempts("layers.0.q.weight_dequantize"))
    assert found is not None and found.name == "layers.0.q.matmul"


def test_none_is_found(tmp_path: Path) -> None:
    model = save(Decoder(layers=1).model(), tmp_path)
    assert failing_node(model, Attempts("no such node")) is None
    assert failing_node(model, Attempts("embed"), seconds=-1) is None
    assert describe(None, ["first", "second"]) == "first; second"
    assert describe(None, []) == "the builder gives no reason"
