"""The target `tensorrt-llm`: quantized checkpoints that TensorRT-LLM, vLLM and SGLang load."""

from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE
from exporter.core.engine_options import PLAIN
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.packages import installed_version
from exporter.core.progress import Progress
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support
from exporter.core.task import GENERATE, Task
from targets.base import (
    ASKED_ROUNDINGS,
    ActivationRounding,
    BuildResult,
    BuildSource,
    DeviceOptions,
    EngineOptions,
    EngineTarget,
    Footprint,
    Limits,
    RowReader,
    Runner,
    RunOptions,
    StoredModel,
    refuse_engine_options,
)
from targets.tensorrt_llm import formats, served_by, support
from targets.tensorrt_llm.defaults import completed
from targets.tensorrt_llm.served_rows import served_rows

OPTIONS = frozenset({"--tp", "--pp", "--format", "--engine"})
# Writing a checkpoint needs none of them: they are what loads it, or compiles it.
PACKAGES = {"tensorrt-llm": "tensorrt_llm", "vllm": "vllm", "sglang": "sglang"}


class TensorRtLlmTarget(EngineTarget):
    """Writes checkpoints and reads them back; targets.base.Target says what each method does."""

    name = "tensorrt-llm"
    calibrated_caches = frozenset({"int8"})
    footprint = Footprint(program_bytes=20e3, layer_bytes=2e3)

    def probe(self) -> Support:
        """Checkpoints can be written everywhere."""
        return Support("native")

    def versions(self) -> dict[str, str]:
        return {name: installed_version(package) for name, package in PACKAGES.items()}

    def supports(
        self,
        config: ModelConfig,
        recipe: Recipe,
        device: DeviceOptions = THIS_MACHINE,
        engine: EngineOptions = PLAIN,
        task: Task = GENERATE,
    ) -> Support:
        if task.classifies:
            why = "servers of checkpoints compute the logits of the whole vocabulary: there is no head of labels alone"
            return Support("refused", why, "use --target tensorrt, onnxruntime or tvm; or generate one token")
        found = support.recipe_support(config, recipe, engine)
        served = served_by.served_support(recipe, formats.form_of(engine), served_by.named_devices(device))
        return found if served.usable else served

    def complete(
        self,
        recipe: Recipe,
        unnamed: frozenset[str],
        config: ModelConfig | None = None,
        engine: EngineOptions = PLAIN,
    ) -> Recipe:
        return completed(recipe, unnamed, config, engine)

    def matrix_bits(self, precision: Precision, rows: int, width: int) -> int:
        return formats.matrix_bits(precision, rows, width)

    def activation_rounding(self, precision: Precision) -> ActivationRounding | None:
        return ASKED_ROUNDINGS.get(precision.activations)

    def served_rows(self, rows: RowReader, recipe: Recipe, form: str | None = None) -> RowReader:
        return served_rows(rows, form or formats.HF, recipe.lm_head.kind)

    def devices(self) -> dict[str, str]:
        return served_by.device_names()

    def check_options(self, device: DeviceOptions, engine: EngineOptions = PLAIN, limits: Limits | None = None) -> None:
        refuse_engine_options(self.name, engine, OPTIONS)
        served_by.refuse_cpu_options(self.name, device)
        served_by.named_devices(device)
        if engine.format is not None and engine.format not in formats.FORMS:
            what = f"--format {engine.format} is unknown"
            raise InputError("usage.format", what, f"use one of {', '.join(formats.FORMS)}")
        if engine.compile_engine and limits is not None:
            self._check_compiler(engine, limits)

    def _check_compiler(self, engine: EngineOptions, limits: Limits) -> None:
        if formats.form_of(engine) != formats.LEGACY:
            what = "--engine compiles TensorRT-LLM checkpoints; this form is loaded as it is"
            raise UnsupportedError("tensorrt_llm.engine", what, "give --format trtllm, or leave --engine out")
        from targets.tensorrt_llm.trtllm_build import compiler_missing

        if missing := compiler_missing(limits, engine):
            raise missing

    def capabilities(self) -> dict[str, Support]:
        return support.capabilities()

    def build(self, source: BuildSource, out_dir: Path, progress: Progress) -> BuildResult:
        from targets.tensorrt_llm.build import build_checkpoint

        return build_checkpoint(source, out_dir, progress, self.versions())

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner:
        raise UnsupportedError(
            "tensorrt_llm.run",
            "this artifact is a checkpoint for a server, not an engine that enginesmith runs",
            "serving.md in the artifact says how to serve it; `enginesmith verify` reads it back",
        )

    def stored_model(self, engine_dir: Path, config: ModelConfig, recipe: Recipe) -> StoredModel | None:
        from targets.tensorrt_llm.stored import open_stored

        return open_stored(engine_dir, config, recipe)
