"""From the quantized canonical slices to the one strongly typed ONNX graph that TensorRT builds an engine from.

docs/tensorrt-graph.md says which types stand where, and why. Inputs and outputs: targets.tensorrt.signature.
"""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, Slice
from exporter.core.disk import output_errors
from exporter.core.errors import UnsupportedError
from targets.base import BuildSource
from targets.tensorrt.cache_length import cache_length
from targets.tensorrt.file_names import DATA, MODEL
from targets.tensorrt.formats import arithmetic
from targets.tensorrt.lowering import SliceLowering, Step
from targets.tensorrt.mask import make_step
from targets.tensorrt.operators import lower_node
from targets.tensorrt.signature import TensorSpec, TypedModel, graph_inputs, graph_outputs
from targets.tensorrt.typed_graph import TypedGraph
from targets.tensorrt.weight_file import TypedWeights

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TYPES = {
    "int64": ir.DataType.INT64,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
Report = Callable[[float, str], None]


def lower(source: BuildSource, out_dir: Path, progress: Report) -> TypedModel:
    """Write model.onnx and model.onnx.data into `out_dir`; the same source gives the same bytes."""
    kind = arithmetic(source.recipe)
    if source.recipe.kv_cache != kind and not source.task.classifies:
        what = f"a KV cache in {source.recipe.kv_cache} beside arithmetic in {kind}"
        raise UnsupportedError("tensorrt.kv_cache", what, f"use --kv-cache {kind}")
    with TypedWeights(out_dir / DATA, source.checkpoint, source.rows, HALVES[kind]) as weights:
        lowering = _Engine(source, weights, kind)
        model = lowering.lower(progress)
    serialized = ir.to_proto(model).SerializeToString(deterministic=True)
    with output_errors(out_dir / MODEL):
        (out_dir / MODEL).write_bytes(serialized)
    inputs, outputs = lowering.inputs, lowering.outputs
    return TypedModel(out_dir / MODEL, kind, kind, inputs, outputs, weights.weights_bytes)


class _Engine:
    """The graph of a whole model on its way: slices are appended in the order the data takes."""

    def __init__(self, source: BuildSource, weights: TypedWeights, kind: str) -> None:
        self.source, self.weights = source, weights
        config, task = source.config, source.task
        self.length = cache_length(source.limits)
        self.inputs: dict[str, TensorSpec] = graph_inputs(config, task, kind, self.length)
        self.outputs: dict[str, TensorSpec] = graph_outputs(config, task, kind, self.length, self._logits())
        vendor = any(precision.activations.startswith("nvfp4") for precision in source.recipe.precisions)
        self.graph = TypedGraph(vendor_operators=vendor)
        self.values = {
            name: self.graph.input(name, TYPES[spec.dtype], spec.shape) for name, spec in self.inputs.items()
        }
        self.presents: dict[str, ir.Value] = {}

    def lower(self, progress: Report) -> ir.Model:
        step = make_step(self.graph, self.values, self.length)
        slices = self.source.model.slices
        hidden = self.values["input_ids"]
        for done, part in enumerate(slices):
            progress(done / len(slices), part.label)
            hidden = self._slice(part, step, hidden)
        self._outputs(hidden)
        return self.graph.model()

    def _slice(self, part: Slice, step: Step, hidden: ir.Value) -> ir.Value:
        """Append a slice -> what leaves it, under its name in the engine."""
        low = SliceLowering(self.graph, self.weights, part, self._prefix(part), step)
        low.bind(self._feeds(part, step, hidden))
        for node in part.structure.graph:
            lower_node(low, node)
        outputs = {str(output.name): output for output in part.structure.graph.outputs}
        if part.kind == "layer" and step.write_indices is not None:
            for which in ("key", "value"):
                self.presents[f"present.{part.index}.{which}"] = low.tensor(outputs[f"present_{which}"])
        leaving = low.tensor(next(iter(outputs.values())))
        leaving.name = self._leaving(part)
        return leaving

    def _feeds(self, part: Slice, step: Step, hidden: ir.Value) -> dict[str, ir.Value]:
        if part.kind != "layer":
            return {"input_ids": hidden, "hidden": hidden}
        past = {f"past_{w}": self.values.get(f"past_key_values.{part.index}.{w}") for w in ("key", "value")}
        cached = {name: value for name, value in past.items() if value is not None}
        return {"hidden": hidden, "position_ids": step.position_ids, **cached}

    def _prefix(self, part: Slice) -> str:
        return "" if part.index is None else f"layers.{part.index}."

    def _leaving(self, part: Slice) -> str:
        """`layers.N.hidden` enters layer N; `final.hidden` leaves the last one."""
        if part.kind == "head":
            return "logits"
        following = 0 if part.index is None else part.index + 1
        return f"layers.{following}.hidden" if following < len(self.source.model.layers) else "final.hidden"

    def _outputs(self, logits: ir.Value) -> None:
        values = {"logits": logits, **self.presents}
        for name, spec in self.outputs.items():
            value = values[name]
            self.graph.output(value, TYPES[spec.dtype], spec.shape)
            value.name = name

    def _logits(self) -> int:
        head = self.source.model.head.weights["lm_head.weight"]
        assert isinstance(head, CheckpointWeight)
        return self.weights.shape(head)[0]
