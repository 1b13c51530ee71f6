"""Which node of a graph the builder fails on: the first whose prefix of the graph does not build."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Prefixes end at nodes whose output a network may give: codes are no outputs, and shapes no layers.
NO_END = {"QuantizeLinear", "DequantizeLinear", "TRT_FP4DynamicQuantize", "Constant", "Shape", "Cast", "Reshape"}
SECONDS = 60.0
Attempt = Callable[[bytes], str]


@dataclass(frozen=True)
class FailingNode:
    """A node that does not build, with the builder's reason."""

    name: str
    operator: str
    reason: str


def failing_node(model: Path, attempt: Attempt, seconds: float = SECONDS) -> FailingNode | None:
    """Search with ever longer prefixes, then by halves; None where the time does not suffice or every prefix builds.

    `attempt` builds a prefix (serialized ONNX, weights in the model's own file) and returns why it failed, or nothing.
    """
    import onnx

    graph = onnx.load(model, load_external_data=False)
    ends = [index for index, node in enumerate(graph.graph.node) if node.op_type not in NO_END]
    deadline = time.monotonic() + seconds
    reasons: dict[int, str] = {}

    def fails(position: int) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError
        reasons[position] = attempt(prefix_of(graph, ends[position] + 1))
        return bool(reasons[position])

    try:
        first = _first(len(ends), fails)
    except TimeoutError:
        return None
    if first is None:
        return None
    node = graph.graph.node[ends[first]]
    return FailingNode(node.name or f"number {ends[first]}", node.op_type, reasons[first])


def _first(count: int, fails: Callable[[int], bool]) -> int | None:
    """The first of `count` positions that fails, where all after it do too: 1, 2, 4 ... then halves between."""
    low, high = -1, 0
    while high < count and not fails(high):
        low, high = high, 2 * high + 1
    if high >= count:
        if low == count - 1 or not fails(count - 1):
            return None
        high = count - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high


def prefix_of(model: Any, length: int) -> bytes:
    """The first `length` nodes as a model: it gives what it holds of the outputs, and its last node's value.

    The type told for that value means nothing: strongly typed networks take every type from the nodes.
    """
    import onnx

    kept = model.graph.node[:length]
    made = {name for node in kept for name in node.output}
    used = {name for node in kept for name in node.input}
    given = [value for value in model.graph.output if value.name in made]
    last = kept[-1].output[0]
    if last not in {value.name for value in given}:
        given.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    graph = onnx.helper.make_graph(
        kept,
        "prefix",
        [value for value in model.graph.input if value.name in used],
        given,
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    prefix = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(prefix.SerializeToString())


def describe(node: FailingNode | None, errors: list[str]) -> str:
    """The node and its reason, or else all that the builder said."""
    if node is None:
        return "; ".join(errors) or "the builder gives no reason"
    return f"node {node.name} ({node.operator}): {node.reason}"
