"""Building: the typed graph and its weights are written, then TensorRT compiles them into a plan."""

from dataclasses import asdict
from pathlib import Path

from exporter.core.progress import PartOfStage, Progress
from targets.base import BuildResult, BuildSource
from targets.tensorrt.builder import build_plan
from targets.tensorrt.cache_length import cache_length
from targets.tensorrt.devices import resolve_device
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.file_names import DATA, INDEX, MODEL, PLAN
from targets.tensorrt.lower import lower
from targets.tensorrt.plan_report import EngineRequest, PlanReport
from targets.tensorrt.profiles import profiles
from targets.tensorrt.signature import TensorSpec, TypedModel
from targets.tensorrt.toolkit import find_toolkit

# The share of the stage that graph and weights take; compiling takes the rest.
GRAPH_SHARE = 0.3


def build_engine(source: BuildSource, out_dir: Path, progress: Progress, versions: dict[str, str]) -> BuildResult:
    """Write model.onnx, model.onnx.data, engine.plan and engine.json. Raises UnsupportedError (`tensorrt.*`) naming
    the node that TensorRT refuses."""
    toolkit = find_toolkit()
    device = resolve_device(source.device, toolkit, source.engine)
    request = EngineRequest.of(device, profiles(source.limits, source.engine, source.task), source.engine)
    model = lower(source, out_dir, PartOfStage(progress, 0.0, GRAPH_SHARE).advance)
    compiling = PartOfStage(progress, GRAPH_SHARE, 1.0)
    plan = build_plan(model.path, request, out_dir / PLAN, compiling.advance)
    engine_index(source, model, plan).write(out_dir)
    return BuildResult(
        files=[MODEL, DATA, PLAN, INDEX],
        toolchain=versions,
        signature={"inputs": _described(model.inputs), "outputs": _described(model.outputs)},
        weights_bytes=model.weights_bytes,
        requirements={"gpu": plan.requirements},
        report=plan.manifest_facts(),
        built_by=plan.built_by,
    )


def engine_index(source: BuildSource, model: TypedModel, plan: PlanReport) -> EngineIndex:
    """What a runner must know of the engine."""
    config, classifies = source.config, source.task.classifies
    return EngineIndex(
        toolkit=plan.toolkit,
        version=plan.version,
        compute_capabilities=plan.compute_capabilities,
        arithmetic=model.arithmetic,
        cache_type=model.cache_type,
        cache_length=0 if classifies else cache_length(source.limits),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        outputs=int(model.outputs["logits"].shape[1]),
        task=source.task.kind,
        profiles=plan.profiles,
        version_compatible=source.engine.version_compatible,
        hardware_compatible=source.engine.hardware_compatible,
    )


def _described(tensors: dict[str, TensorSpec]) -> dict[str, dict[str, object]]:
    return {name: {**asdict(spec), "shape": list(spec.shape)} for name, spec in tensors.items()}
