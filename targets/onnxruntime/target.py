"""The target `onnxruntime`: engines for ONNX Runtime on a CPU, loadable by onnxruntime-genai as they are."""

import platform
from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE
from exporter.core.engine_options import PLAIN
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
    Limits,
    Runner,
    RunOptions,
    refuse_devices,
    refuse_engine_options,
)
from targets.onnxruntime.file_names import MODEL
from targets.onnxruntime.stored_rows import in_blocks, matrix_bits
from targets.onnxruntime.support import capabilities, recipe_support

MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
PACKAGES = ("onnxruntime", "onnx", "onnx-ir")


class OnnxRuntimeTarget(EngineTarget):
    """Lowers the canonical model to GroupQueryAttention and MatMulNBits; targets.base.Target says what each does."""

    name = "onnxruntime"
    calibrated_caches = frozenset({"int8"})

    def probe(self) -> Support:
        """Whether engines can be built here; running one needs onnxruntime alone."""
        missing = [name for name, version in self.versions().items() if not version]
        if missing:
            runs = "" if "onnxruntime" in missing else " (engines built before do run)"
            remedy = "pip install 'enginesmith[build,onnxruntime]'"
            return Support("refused", f"not installed: {', '.join(missing)}{runs}", remedy)
        if platform.machine() not in MACHINES:
            why = f"ONNX Runtime has no MatMulNBits kernels for {platform.machine()}"
            return Support("refused", why, f"use one of {', '.join(MACHINES)}")
        return Support("native")

    def versions(self) -> dict[str, str]:
        return {name: installed_version(name) for name in PACKAGES}

    def supports(
        self,
        config: ModelConfig,
        recipe: Recipe,
        device: DeviceOptions = THIS_MACHINE,
        engine: EngineOptions = PLAIN,
        task: Task = GENERATE,
    ) -> Support:
        return recipe_support(config, recipe)

    def complete(
        self,
        recipe: Recipe,
        unnamed: frozenset[str],
        config: ModelConfig | None = None,
        engine: EngineOptions = PLAIN,
    ) -> Recipe:
        return recipe

    def matrix_bits(self, precision: Precision, rows: int, width: int) -> int:
        return matrix_bits(precision, rows, width)

    def activation_rounding(self, precision: Precision) -> ActivationRounding | None:
        if in_blocks(precision):
            return "group"
        return ASKED_ROUNDINGS[precision.activations] if precision.kind == "fp8" and precision.activations else None

    def devices(self) -> dict[str, str]:
        return {}

    def check_options(self, device: DeviceOptions, engine: EngineOptions = PLAIN, limits: Limits | None = None) -> None:
        refuse_engine_options(self.name, engine)
        refuse_devices(self.name, device)

    def capabilities(self) -> dict[str, Support]:
        return capabilities()

    def build(self, source: BuildSource, out_dir: Path, progress: Progress) -> BuildResult:
        from targets.onnxruntime.build import build_engine

        return build_engine(source, out_dir, progress, self.versions())

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner:
        from targets.onnxruntime.runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(engine_dir / MODEL, config, limits, options)
