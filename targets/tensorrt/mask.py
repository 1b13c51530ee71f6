"""What a step needs to know about positions, made in the graph from its inputs.

Attention gets a mask of its own, [B, 1, S, M]: position i of row b sees what lies at cache positions j up to
`position_ids[b, i]`. TensorRT-RTX 1.7's parser connects `nonpad_kv_seqlen` to no layer, and TensorRT's own causal mask
is aligned with the upper left corner, so that a decode step would see the first position alone.
"""

import numpy as np
import onnx_ir as ir

from targets.tensorrt.lowering import Step
from targets.tensorrt.typed_graph import BOOL, TypedGraph


def make_step(graph: TypedGraph, inputs: dict[str, ir.Value], positions: int) -> Step:
    """The step of an engine with these inputs; `positions` of the cache, or of the longest prompt without one."""
    mask = _mask(graph, inputs["position_ids"], positions) if "write_indices" in inputs else None
    return Step(inputs["position_ids"], inputs["last_rows"], inputs.get("write_indices"), mask, positions)


def _mask(graph: TypedGraph, position_ids: ir.Value, length: int) -> ir.Value:
    columns = np.arange(length, dtype=np.int64).reshape(1, 1, 1, length)
    cached = graph.initializer(ir.tensor(columns, name="step.cache_positions"))
    asking = graph.make("Unsqueeze", [position_ids, graph.constant([1, 3])], "step.asking_positions")
    return graph.make("LessOrEqual", [cached, asking], "step.mask", BOOL)
