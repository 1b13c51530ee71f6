"""Ways to build an engine that may run on the GPU at hand, tried one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.core.errors import EngineSmithError
from exporter.core.gpu import HostGpu, sm
from targets.base import RunOptions
from targets.gpu_names import DEVICES
from targets.tensorrt.builder import build_plan
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.execution import TensorRtExecution, cuda_errors
from targets.tensorrt.file_names import MODEL, PLAN
from targets.tensorrt.plan_report import EngineRequest
from targets.tensorrt.runner import TensorRtRunner
from targets.tensorrt.toolkit import RTX, TENSORRT, Toolkit
from tests.targets.tensorrt.contract_engines import ContractEngine


@dataclass(frozen=True)
class Build:
    """The command line's options for a build, and what they mean to the builder."""

    flags: tuple[str, ...]
    device: BuildDevice


@dataclass(frozen=True)
class Tried:
    """A build and why it does not run here; empty: it does."""

    build: Build
    refused: str

    def __str__(self) -> str:
        return f"{' '.join(self.build.flags) or '(no options)'}: {self.refused or 'runs'}"


def candidates(toolkit: Toolkit, gpu: HostGpu) -> list[Build]:
    """TensorRT builds for the GPU at hand. RTX, for one that it does not name: for many at once, then for older and
    newer ones by name."""
    if not toolkit.is_rtx:
        return [Build((), BuildDevice(TENSORRT, (gpu.capability,), current=True))]
    named = {name: device.capability for name, device in DEVICES.items() if device.in_rtx}
    exact = [name for name, capability in named.items() if capability == gpu.capability]
    builds = [Build(("--device", name), BuildDevice(RTX, (named[name],))) for name in exact or named]
    portable = Build(("--hardware-compatible",), BuildDevice(RTX, ("8.0",), portable=True))
    return builds if exact else [portable, *reversed(builds)]


def try_builds(builds: list[Build], engine: ContractEngine, toolkit: Toolkit, folder: Path) -> Iterator[Tried]:
    """Build and run one step with each."""
    for build in builds:
        try:
            with open_built(engine, build.device, toolkit, folder) as runner:
                logits = runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
            yield Tried(build, "" if np.isfinite(logits).all() else "its logits are not finite")
        except EngineSmithError as error:
            yield Tried(build, error.message)


def open_built(
    engine: ContractEngine, device: BuildDevice, toolkit: Toolkit, folder: Path, options: RunOptions | None = None
) -> TensorRtRunner:
    """A runner on an engine just built, past all checks of the host."""
    index = replace(
        engine.index, toolkit=toolkit.name, version=toolkit.version, compute_capabilities=device.capabilities
    )
    request = EngineRequest(device, index.profiles, hardware_compatible=device.portable)
    build_plan(engine.folder / MODEL, request, folder / PLAN, lambda fraction, phase: None)
    options = options or RunOptions(1, 1)
    with cuda_errors():
        execution = TensorRtExecution(toolkit.module, index, folder / PLAN, options.batch)
    return TensorRtRunner(execution, index, engine.checkpoint.config, engine.limits, options)


def describe(gpu: HostGpu, toolkit: Toolkit, tried: list[Tried]) -> str:
    return f"{toolkit.label} on {gpu.name} ({sm(gpu.capability)}): " + "; ".join(map(str, tried))
