"""The target `tensorrt`: engines for NVIDIA GPUs, built by TensorRT 11 on one or by TensorRT-RTX anywhere."""

from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE
from exporter.core.engine_options import PLAIN
from exporter.core.gpu import version_numbers
from exporter.core.packages import installed_version
from exporter.core.progress import Progress
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support
from exporter.core.task import GENERATE, Task
from targets.base import (
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
    refuse_engine_options,
)
from targets.tensorrt import devices, formats, support
from targets.tensorrt.defaults import completed
from targets.tensorrt.profiles import profiles
from targets.tensorrt.served_rows import served_rows
from targets.tensorrt.toolkit import find_toolkit, probe_toolkit

OPTIONS = frozenset(
    {"--opt-batch", "--opt-prompt", "--max-prompt", "--timing-cache", "--version-compatible", "--hardware-compatible"}
)
# What versions tell, by name: either of the first two builds and runs engines.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx", "onnx": "onnx", "onnx-ir": "onnx-ir"}
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}


class TensorRtTarget(EngineTarget):
    """Lowers the canonical model to strongly typed ONNX and builds it; targets.base.Target says what each does."""

    name = "tensorrt"
    calibrated_caches = frozenset[str]()
    has_stand_in = True
    # The graph's weights stay beside the plan; plans of 6 layers have 9 MB of kernels; the builder holds weights twice.
    footprint = Footprint(copies=2, program_bytes=9e6, layer_bytes=20e3, compile_share=2.2)

    def probe(self) -> Support:
        """Whether engines can be built here; running one needs a GPU and the toolkit that built it."""
        missing = [name for name in ("onnx", "onnx-ir") if not self.versions()[name]]
        if missing:
            return Support("refused", f"not installed: {', '.join(missing)}", "pip install 'enginesmith[build]'")
        return probe_toolkit()

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
        if recipe.name == "auto":
            why = "auto gives matrices 6 bits, embeddings too, which TensorRT has no kernels for"
            return Support("refused", why, "use --recipe int4-awq or fp8, or targets tvm and onnxruntime")
        named = map(version_numbers, devices.named_capabilities(device))
        capabilities = [(major, minor) for major, minor, *_ in named]
        return support.recipe_support(config, recipe, min(capabilities, default=None), task)

    def complete(
        self,
        recipe: Recipe,
        unnamed: frozenset[str],
        config: ModelConfig | None = None,
        engine: EngineOptions = PLAIN,
    ) -> Recipe:
        return completed(recipe, unnamed)

    def matrix_bits(self, precision: Precision, rows: int, width: int) -> int:
        return formats.matrix_bits(precision, rows, width)

    def activation_rounding(self, precision: Precision) -> ActivationRounding | None:
        return formats.activation_rounding(precision)

    def served_rows(self, rows: RowReader, recipe: Recipe, form: str | None = None) -> RowReader:
        return served_rows(rows)

    def roundoff(self, recipe: Recipe) -> float:
        return ROUNDOFF[formats.arithmetic(recipe)]

    def devices(self) -> dict[str, str]:
        return devices.device_names()

    def check_options(self, device: DeviceOptions, engine: EngineOptions = PLAIN, limits: Limits | None = None) -> None:
        refuse_engine_options(self.name, engine, OPTIONS)
        devices.named_capabilities(device)
        if limits is not None:
            profiles(limits, engine, GENERATE)
        if probe_toolkit().usable:
            devices.resolve_device(device, find_toolkit(), engine)

    def capabilities(self) -> dict[str, Support]:
        return support.capabilities()

    def build(self, source: BuildSource, out_dir: Path, progress: Progress) -> BuildResult:
        from targets.tensorrt.build import build_engine

        return build_engine(source, out_dir, progress, self.versions())

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner:
        from targets.tensorrt.execution import open_engine

        return open_engine(engine_dir, config, limits, options)

    def stand_in(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner | None:
        from targets.tensorrt.stand_in import open_stand_in

        return open_stand_in(engine_dir, config, limits, options)
