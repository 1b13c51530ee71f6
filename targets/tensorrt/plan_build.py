"""Parse, configure, build: one plan in this process. targets.tensorrt.builder runs it in one of its own."""

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from exporter.core.errors import UnsupportedError
from exporter.core.gpu import version_numbers
from exporter.core.gpu_needs import GpuNeeds
from targets.tensorrt.build_progress import BuildProgress, Report, make_monitor
from targets.tensorrt.devices import PORTABLE
from targets.tensorrt.find_node import describe, failing_node
from targets.tensorrt.kernel_report import Kernel, inspected_kernels, kernel_report, logged_kernels
from targets.tensorrt.layer_report import LayerReport, layer_report
from targets.tensorrt.network import (
    Parsed,
    configure,
    dimensions,
    inputs,
    outputs,
    parse_model,
    write_timing_cache,
)
from targets.tensorrt.plan_report import EngineRequest, PlanReport
from targets.tensorrt.profiles import shapes
from targets.tensorrt.support import LEAST_SM
from targets.tensorrt.toolkit import Toolkit

# TensorRT's number types that need a newer GPU, by the kinds of targets.tensorrt.support.
NEEDING = {"BF16": "bf16", "FP8": "fp8", "FP4": "nvfp4"}
# RTX compiles for no data center Blackwell (10.0).
RTX_FP4 = (12, 0)
CACHED = "present."


def build_here(toolkit: Toolkit, model: Path, request: EngineRequest, out: Path, report: Report) -> PlanReport:
    """Build `model` into the file `out`, written as the builder gives it. Blocks; `report` may raise to stop it.

    Raises UnsupportedError `tensorrt.parser` or `tensorrt.builder`, which name the node, or what `report` raised.
    Nothing is left at `out` then.
    """
    began = time.monotonic()
    parsed = parse_model(toolkit, model)
    layers = layer_report(parsed.network)
    config = configure(parsed, request)
    progress = BuildProgress(report)
    config.progress_monitor = monitor = make_monitor(toolkit.module, progress)
    try:
        built = _write_plan(parsed, config, out)
        if progress.error is not None:
            raise progress.error
        if not built:
            raise _builder_error(parsed, model, request)
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    del monitor
    if request.timing_cache is not None and not toolkit.is_rtx:
        write_timing_cache(config, request.timing_cache)
    return _report(parsed, request, layers, out, time.monotonic() - began)


def _write_plan(parsed: Parsed, config: Any, out: Path) -> bool:
    with out.open("wb") as file:
        writer = _make_writer(parsed.toolkit.module, file)
        return bool(parsed.builder.build_serialized_network_to_stream(parsed.network, config, writer))


def _make_writer(module: Any, file: BinaryIO) -> Any:
    """Streams the plan into a file: as one piece of memory it would be held twice."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _builder_error(parsed: Parsed, model: Path, request: EngineRequest) -> UnsupportedError:
    """Names the node that fails, found by building prefixes of the graph."""
    toolkit = parsed.toolkit

    def attempt(prefix: bytes) -> str:
        try:
            part = parse_model(toolkit, model, prefix)
        except UnsupportedError as error:
            return error.message
        with _standard_error_silent():
            plan = part.builder.build_serialized_network(part.network, configure(part, request))
        return "" if plan is not None else "; ".join(part.log.errors)

    what = describe(failing_node(model, attempt), parsed.log.errors)
    remedy = "choose another recipe or --device: these kernels do not exist for it"
    return UnsupportedError(
        "tensorrt.builder", f"{toolkit.label} cannot build for {request.device.label}: {what}", remedy
    )


@contextmanager
def _standard_error_silent() -> Iterator[None]:
    """The compiler in TensorRT prints every failure of an attempt, beside what it logs."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _report(parsed: Parsed, request: EngineRequest, layers: LayerReport, out: Path, seconds: float) -> PlanReport:
    toolkit, log = parsed.toolkit, parsed.log
    capabilities = capabilities_of(toolkit, request, layers)
    plan_bytes, activation = out.stat().st_size, log.figure("Activation")
    external = input_bytes(parsed.network, request)
    needs = GpuNeeds(
        toolkit.name,
        toolkit.version,
        capabilities,
        request.version_compatible,
        request.hardware_compatible,
        toolkit.cuda,
        toolkit.min_driver,
        plan_bytes + activation + external,
    )
    return PlanReport(
        toolkit.name,
        toolkit.version,
        f"{toolkit.label} for {request.device.label}",
        capabilities,
        request.profiles,
        request.flags,
        layers.to_json(),
        kernel_report(engine_kernels(parsed, out), [profile.name for profile in request.profiles]),
        plan_bytes,
        log.figure("Weights"),
        activation,
        external,
        needs.to_json(),
        seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        log.warnings,
    )


def engine_kernels(parsed: Parsed, plan: Path) -> list[Kernel]:
    """What the builder told, or the engine itself where there is the GPU that TensorRT builds for."""
    kernels = logged_kernels(text for _, text in parsed.log.messages)
    if kernels or parsed.toolkit.is_rtx:
        return kernels
    module = parsed.toolkit.module
    runtime = module.Runtime(parsed.logger)
    # Version-compatible plans carry the code that loads them.
    runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    return [] if engine is None else inspected_kernels(engine, module)


def capabilities_of(toolkit: Toolkit, request: EngineRequest, layers: LayerReport) -> tuple[str, ...]:
    """Those that the engine was built for; for hardware-compatible engines the lowest that has its number types."""
    if not request.hardware_compatible:
        return request.device.capabilities
    floors = {**LEAST_SM, **({"nvfp4": RTX_FP4} if toolkit.is_rtx else {})}
    needed = [floors[kind] for name, kind in NEEDING.items() if name in layers.types]
    return (".".join(map(str, max([version_numbers(PORTABLE), *needed]))),)


def input_bytes(network: Any, request: EngineRequest) -> int:
    """Inputs, outputs and caches of the largest step. A cache comes out where it went in, so it counts once."""
    given = [tensor for tensor in outputs(network) if not tensor.name.startswith(CACHED)]
    total = 0
    for tensor in [*inputs(network), *given]:
        axes = dimensions(tensor)
        most = max(prod(shapes(profile, axes)[2]) for profile in request.profiles)
        total += most * int(tensor.dtype.itemsize)
    return total
