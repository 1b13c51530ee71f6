"""Engines of published shapes made on the GPU machine itself, from a seed: real weights do not fit through the door.

Weights are random, so what an engine says means nothing; how long it takes does. Scales of activations are one constant
for every matrix, in the place of calibration.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from calibration.insert_precision import apply_recipe
from calibration.presets import preset
from calibration.weight_rows import WeightRows
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig, parse_config
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.gpu import gpu_host, sm
from exporter.core.labelled import labelled
from exporter.core.recipe import Recipe
from exporter.core.task import GENERATE, Task
from targets.base import BuildSource, Limits, Runner, RunOptions
from targets.tensorrt.build import engine_index
from targets.tensorrt.builder import build_plan
from targets.tensorrt.defaults import completed
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.execution import open_engine
from targets.tensorrt.file_names import PLAN
from targets.tensorrt.lower import lower
from targets.tensorrt.plan_report import EngineRequest, PlanReport
from targets.tensorrt.profiles import profiles
from targets.tensorrt.stand_in import open_stand_in
from targets.tensorrt.toolkit import Toolkit, find_toolkit
from tests.benchmarks.make_checkpoint import write_weights
from tests.benchmarks.shapes import SHAPES
from tests.gpu.building import candidates, describe, try_builds
from tests.support.canonical_llama import canonical_llama
from tests.targets.tensorrt.contract_engines import contract_engine

INPUT_SCALE = 0.04
SHARD_BYTES = 4_000_000_000
CHOICES = frozenset({"lm_head", "embedding", "kv_cache"})


@dataclass
class MadeEngine:
    """An engine on disk; `seconds` by phase. `plan` None: it was not compiled, its graph runs on the CPU."""

    folder: Path
    config: ModelConfig
    recipe: Recipe
    limits: Limits
    weights_bytes: int
    plan: PlanReport | None
    seconds: dict[str, float] = field(default_factory=dict)

    def open(self, batch: int) -> Runner:
        opener: Callable[..., Runner] = open_engine if self.plan else open_stand_in
        return opener(self.folder, self.config, self.limits, RunOptions(0, batch))

    @property
    def facts(self) -> dict[str, Any]:
        """For reports."""
        host = gpu_host()
        return {
            "gpu": f"{host.gpus[0].name} ({sm(host.gpus[0].capability)})" if host.gpus else "none: CPU stand-in",
            "built_by": self.plan.built_by if self.plan else "not built",
            "recipe": self.recipe.name,
            "layers": self.config.num_layers,
            "weights_bytes": self.weights_bytes,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


def write_checkpoint(folder: Path, shape: str, seed: int, layers: int | None = None) -> Checkpoint:
    """A random checkpoint of a named shape, of fewer layers if asked."""
    raw = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = parse_config(raw)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, config.tensor_shapes, seed, SHARD_BYTES)
    return Checkpoint.open(folder, config)


def build_source(
    checkpoint: Checkpoint, recipe: Recipe, limits: Limits, task: Task = GENERATE, options: EngineOptions = PLAIN
) -> BuildSource:
    """What a build would hand to its target, without tracing and calibration."""
    seen = labelled(checkpoint, task)
    modules = [name.removesuffix(".weight") for name in (*seen.config.tensor_shapes, "lm_head.weight")]
    scales = dict.fromkeys(modules, INPUT_SCALE)
    model = apply_recipe(canonical_llama(seen.config, limits.max_seq_len), recipe, seen.config, scales)
    rows = WeightRows(seen, threads=os.cpu_count() or 1)
    source = BuildSource(seen.config, recipe, model, seen, rows, limits, input_scales=scales)
    return replace(source, task=task, engine=options)


def make_engine(
    work: Path,
    checkpoint: Checkpoint,
    recipe: str,
    limits: Limits,
    task: Task = GENERATE,
    options: EngineOptions = PLAIN,
    stand_in: bool = False,
) -> MadeEngine:
    """Lower and compile into WORK; with `stand_in` the compiling is left out."""
    chosen = completed(preset(recipe), CHOICES)
    source = build_source(checkpoint, chosen, limits, task, options)
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with timed(seconds, "lower"):
        model = lower(source, work, lambda fraction, detail: None)
    plan = None
    asked = profiles(limits, options, task)
    if not stand_in:
        toolkit = find_toolkit()
        with timed(seconds, "probe"), tempfile.TemporaryDirectory() as folder:
            device = working_device(toolkit, Path(folder))
        with timed(seconds, "compile"):
            request = EngineRequest(device, asked, hardware_compatible=device.portable)
            plan = build_plan(model.path, request, work / PLAN, lambda fraction, detail: None)
    shown = plan or _not_compiled(asked)
    replace(engine_index(source, model, shown), hardware_compatible=_portable(plan)).write(work)
    return MadeEngine(work, source.config, chosen, limits, model.weights_bytes, plan, seconds)


def working_device(toolkit: Toolkit, folder: Path) -> BuildDevice:
    """The first way to build whose engines run on this GPU, by a small one. Ends the program if there is none."""
    from tests.support import tiny

    gpu = gpu_host().gpus[0]
    probe = contract_engine(tiny.write_checkpoint(folder / "checkpoint", head_dim=64), folder)
    tried = []
    for each in try_builds(candidates(toolkit, gpu), probe, toolkit, folder):
        tried.append(each)
        if not each.refused:
            return each.build.device
    raise SystemExit(describe(gpu, toolkit, tried))


def _portable(plan: PlanReport | None) -> bool:
    return plan is not None and "hardware_compatible" in plan.flags


def _not_compiled(asked: tuple[Any, ...]) -> PlanReport:
    """What stands in engine.json of a graph that is run on the CPU alone."""
    facts: dict[str, Any] = {field.name: 0 for field in fields(PlanReport)}
    facts |= {"toolkit": "tensorrt_rtx", "version": "none", "built_by": "nothing", "profiles": asked}
    return PlanReport(**facts | {"compute_capabilities": ("0.0",), "flags": [], "layers": {}, "requirements": {}})


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
