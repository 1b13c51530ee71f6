"""From the canonical slices to the one graph that ONNX Runtime executes, weights written on the way.

Inputs and outputs are those of onnxruntime-genai: `input_ids` and `attention_mask` (1 for each valid position so
far), the caches `past_key_values.N.key/value`, `present.N.key/value` that may be the same buffers, and `logits`
[B, 1, V] of each row's last valid position.
"""

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CanonicalModel, Slice
from exporter.core.config import ModelConfig
from exporter.core.progress import Progress
from targets.onnxruntime.attention import CacheInputs, emit_attention, match_attention
from targets.onnxruntime.engine_graph import Dimensions, EngineGraph
from targets.onnxruntime.kv_cache import KvCache
from targets.onnxruntime.lowering import Lowered, SliceLowering
from targets.onnxruntime.operators import lower_node
from targets.onnxruntime.step_inputs import StepInputs, step_inputs
from targets.onnxruntime.support import HEAD_DIM_MULTIPLE
from targets.onnxruntime.weight_file import WeightFile

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def lower(
    model: CanonicalModel, config: ModelConfig, cache: KvCache, weights: WeightFile, progress: Progress
) -> ir.Model:
    """The engine's graph; its weights refer to `weights`, which is filled along the way."""
    graph = EngineGraph()
    step = step_inputs(graph, standard_attention=config.head_dim % HEAD_DIM_MULTIPLE != 0)
    slices = model.slices
    hidden: Lowered = step.input_ids
    presents: list[tuple[ir.Value, ir.Value]] = []
    for done, part in enumerate(slices):
        progress.advance(done / len(slices), part.label)
        if part.kind == "embedding":
            hidden = _lower_embedding(graph, weights, part, step)
        elif part.kind == "layer":
            hidden, present = _lower_layer(graph, weights, part, step, hidden, cache, cache.shape(config))
            presents.append(present)
        else:
            _lower_head(graph, weights, part, step, hidden, config)
    for index, (key, value) in enumerate(presents):
        graph.output(key, cache.dtype, cache.shape(config))
        graph.output(value, cache.dtype, cache.shape(config))
        key.name, value.name = f"present.{index}.key", f"present.{index}.value"
    return graph.model()


def _lower_embedding(graph: EngineGraph, weights: WeightFile, part: Slice, step: StepInputs) -> ir.Value:
    low = SliceLowering(graph, weights, part, "", step.tokens)
    low.bind({"input_ids": step.input_ids})
    for node in part.structure.graph:
        lower_node(low, node)
    hidden = low.tensor(part.structure.graph.outputs[0])
    hidden.name = "layers.0.hidden"
    return hidden


def _lower_layer(
    graph: EngineGraph,
    weights: WeightFile,
    part: Slice,
    step: StepInputs,
    hidden: Lowered,
    cache: KvCache,
    shape: Dimensions,
) -> tuple[Lowered, tuple[ir.Value, ir.Value]]:
    index = part.index
    names = (f"past_key_values.{index}.{which}" for which in ("key", "value"))
    key, value = (graph.input(name, cache.dtype, shape) for name in names)
    low = SliceLowering(graph, weights, part, f"layers.{index}.", step.tokens)
    low.bind({"hidden": hidden, "past_key": key, "past_value": value})
    if step.standard:
        low.bind({**step.standard})
        for node in part.structure.graph:
            lower_node(low, node)
    else:
        scales = _cache_scales(low, cache)
        _lower_with_fused_attention(low, CacheInputs(key, value, step.seqlens_k, step.total_sequence_length, scales))
    outputs = {str(output.name): output for output in part.structure.graph.outputs}
    present = low.tensor(outputs["present_key"]), low.tensor(outputs["present_value"])
    return low.values[outputs["hidden_out"]], present


def _cache_scales(low: SliceLowering, cache: KvCache) -> tuple[ir.Value, ir.Value] | None:
    if low.slice.index is None or not cache.scales:
        return None
    key, value = (
        low.graph.initializer(ir.tensor(np.array([scale], np.float32), name=f"{low.prefix}self_attn.{which}_scale"))
        for which, scale in zip("kv", cache.scales[low.slice.index], strict=True)
    )
    return key, value


def _lower_with_fused_attention(low: SliceLowering, cache: CacheInputs) -> None:
    structure = low.slice.structure.graph
    groups = [match_attention(low, node) for node in structure if node.op_type == "Attention"]
    owner = {node: group for group in groups for node in group.nodes}
    low.claimed = frozenset(owner)
    for node in structure:
        group = owner.get(node)
        if group is None:
            lower_node(low, node)
        elif node.outputs[0] is group.output:
            emit_attention(low, group, cache)


def _lower_head(
    graph: EngineGraph, weights: WeightFile, part: Slice, step: StepInputs, hidden: Lowered, config: ModelConfig
) -> None:
    low = SliceLowering(graph, weights, part, "", step.last_tokens)
    low.bind({"hidden": hidden, "rows": step.last_rows})
    for node in part.structure.graph:
        lower_node(low, node)
    flat = low.tensor(part.structure.graph.outputs[0])
    logits = graph.op("Unsqueeze", [flat, graph.constant([1])], "logits_per_row", outputs=["logits"])
    graph.output(logits, FLOAT, ["batch_size", 1, config.head_size])
