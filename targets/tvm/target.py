"""The target `tvm`: engines compiled by Apache TVM into a native library, for CPUs here and elsewhere."""

from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE
from exporter.core.engine_options import PLAIN
from exporter.core.errors import UnsupportedError
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
    Limits,
    Runner,
    RunOptions,
    refuse_engine_options,
)
from targets.tvm import activations, formats, support
from targets.tvm.defaults import completed
from targets.tvm.devices import device_names, resolve_device
from targets.tvm.link import can_link
from targets.tvm.tuning_choice import known_results

PACKAGES = {"tvm": "apache-tvm", "tvm-ffi": "apache-tvm-ffi", "onnx-ir": "onnx-ir"}
RUNNING = {"tvm", "tvm-ffi"}
REMEDY = "pip install 'enginesmith[build,tvm]'"


class TvmTarget(EngineTarget):
    """Lowers the canonical model to kernels of its own; targets.base.Target says what each method does."""

    name = "tvm"
    calibrated_caches = frozenset[str]()

    def probe(self) -> Support:
        """Whether engines can be built here; running one needs apache-tvm-ffi and TVM's runtime library alone."""
        missing = [name for name, version in self.versions().items() if not version]
        if missing:
            runs = "" if set(missing) & RUNNING else " (engines built before do run)"
            return Support("refused", f"not installed: {', '.join(PACKAGES[name] for name in missing)}{runs}", REMEDY)
        if not can_link():
            return Support("refused", "neither a C compiler nor ziglang is installed to link engines", REMEDY)
        try:
            resolve_device(DeviceOptions())
        except UnsupportedError as error:
            # Devices named by --device can still be built for.
            return Support("native", error.message, error.remedy)
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
        return support.recipe_support(config, recipe)

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
        return activations.activation_rounding(precision)

    def devices(self) -> dict[str, str]:
        return device_names()

    def check_options(self, device: DeviceOptions, engine: EngineOptions = PLAIN, limits: Limits | None = None) -> None:
        refuse_engine_options(self.name, engine)
        known_results(device, resolve_device(device))

    def capabilities(self) -> dict[str, Support]:
        return support.capabilities()

    def build(self, source: BuildSource, out_dir: Path, progress: Progress) -> BuildResult:
        from targets.tvm.build import build_engine

        return build_engine(source, out_dir, progress, self.versions())

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner:
        from targets.tvm.runner import TvmRunner

        return TvmRunner(engine_dir, config, limits, options)
