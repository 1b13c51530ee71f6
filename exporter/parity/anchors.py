"""Values of a layer graph whose meaning its weights give away, matched with the eager layer's modules.

A matrix multiplied with `mlp.gate_proj.weight` yields that module's output, whatever the graph calls it. So even a
raw trace, where nothing is named, can be compared with eager in the middle of a layer.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, Slice

PREPARING = {"Transpose", "DequantizeLinear", "Cast", "Identity"}
DECODING = PREPARING | {"Gather", "Mul", "Reshape"}
"""What turns codes into weights; 4-bit floats are looked up in a table."""


def anchored_values(piece: Slice, modules: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Expected arrays by the names of values in `piece.structure`.

    `modules` is `EagerLayer.probe`'s record: `self_attn.q_proj.in`, `self_attn.q_proj.out`, ...
    """
    inputs = {value.name: value for value in piece.structure.graph.inputs}
    expected: dict[str, np.ndarray] = {}
    for name, weight in piece.weights.items():
        if not isinstance(weight, CheckpointWeight) or not name.endswith(".weight"):
            continue
        value = inputs.get(name) or inputs.get(f"{name}.codes")
        node = consumer(value) if value is not None else None
        parts = [source.split(".", 3)[3].removesuffix(".weight") for source in weight.sources]
        if node is None or any(f"{part}.out" not in modules for part in parts):
            continue
        for value, array in _matches(node, parts, modules):
            if value.name and value.producer() is not None:
                expected.setdefault(value.name, array)
    return expected


def consumer(value: ir.Value) -> ir.Node | None:
    """The node that combines a weight with activations."""
    preparing = DECODING if (value.name or "").endswith(".codes") else PREPARING
    while uses := list(value.uses()):
        node = uses[0].node
        if node.op_type not in preparing:
            return node
        value = node.outputs[0]
    return None


def _matches(node: ir.Node, parts: list[str], modules: dict[str, np.ndarray]) -> Iterator[tuple[ir.Value, np.ndarray]]:
    output = node.outputs[0]
    if node.op_type in ("MatMul", "Gemm"):
        if node.inputs[0] is not None:
            yield node.inputs[0], modules[f"{parts[0]}.in"]
        output = _with_bias(output)
    elif node.op_type == "RMSNormalization" and node.inputs[0] is not None:
        yield node.inputs[0], modules[f"{parts[0]}.in"]
    yield output, np.concatenate([modules[f"{part}.out"] for part in parts], axis=-1)


def _with_bias(output: ir.Value) -> ir.Value:
    """The sum with a bias vector, if that is all that happens to a product."""
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        others = [value for value in uses[0].node.inputs if value is not output and value is not None]
        if others and others[0].is_graph_input() and (others[0].name or "").endswith(".bias"):
            return uses[0].node.outputs[0]
    return output
