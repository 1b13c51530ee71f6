"""Every way in which a host falls short of what an engine for GPUs needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from exporter.core.gpu import GpuHost, HostGpu, sm, version_numbers
from exporter.core.gpu_needs import LABELS, GpuNeeds

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
REBUILD = "build it again from the checkpoint there"


@dataclass(frozen=True)
class Mismatch:
    """One reason why an engine does not run here.

    `what`: `triple`, `cpu_features`, `requirements`, `gpu.driver_missing`, `gpu.none`, `gpu.compute_capability`,
    `gpu.driver_version`, `gpu.cuda`, `gpu.memory`, `tensorrt.missing`, `tensorrt.version`, `tensorrt.flavour`.
    """

    what: str
    message: str
    remedy: str


def gpu_mismatches(data: Any, host: GpuHost) -> list[Mismatch]:
    """Every reason why a host cannot run an engine of these `requirements["gpu"]`; nothing is loaded to find out."""
    needs = GpuNeeds.from_json(data)
    if needs is None:
        why = "what the engine needs of a GPU is not written as this version writes it"
        return [Mismatch("requirements", why, "use the enginesmith version that built it, or a newer one")]
    return [*_runtime(needs, host), *_hardware(needs, host)]


def _runtime(needs: GpuNeeds, host: GpuHost) -> Iterator[Mismatch]:
    here = host.toolkits.get(needs.toolkit)
    others = [f"{LABELS[name]} {version}" for name, version in host.toolkits.items() if name in LABELS]
    install = f"pip install 'enginesmith[{EXTRAS[needs.toolkit]}]'"
    if here is None and others:
        why = f"the engine is a plan of {needs.label}, here is {', '.join(others)}: neither loads plans of the other"
        yield Mismatch("tensorrt.flavour", why, f"{install}, or {REBUILD}")
    elif here is None:
        why = f"the engine needs {needs.label}, which is not installed"
        yield Mismatch("tensorrt.missing", why, f"{install} (in this version), or {REBUILD}")
    elif not needs.fits_version(here):
        rule = "or a later one of the same major version" if needs.version_compatible else "and loads in no other"
        why = f"the engine was built by {needs.label} {rule}, here is {LABELS[needs.toolkit]} {here}"
        yield Mismatch("tensorrt.version", why, f"install {needs.label}, or {REBUILD}")


def _hardware(needs: GpuNeeds, host: GpuHost) -> Iterator[Mismatch]:
    wanted = _wanted(needs)
    if not host.has_driver:
        why = f"the engine needs an NVIDIA GPU ({wanted}) and driver, here is no driver"
        remedy = "run it on a machine with one; in a container, start it with its GPUs (docker run --gpus all)"
        yield Mismatch("gpu.driver_missing", why, remedy)
        return
    yield from _driver(needs, host)
    if not host.gpus:
        why = f"the engine needs an NVIDIA GPU ({wanted}), the driver here shows none"
        yield Mismatch("gpu.none", why, "give this process a GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")
        return
    for check in CHECKS:
        yield from check(needs, host.gpus)


def _wanted(needs: GpuNeeds) -> str:
    return " or ".join(map(sm, needs.compute_capabilities)) + (" or newer" if needs.hardware_compatible else "")


def _driver(needs: GpuNeeds, host: GpuHost) -> Iterator[Mismatch]:
    """A driver's own version decides only where it does not serve the CUDA asked for: an older one may serve it through
    NVIDIA's compatibility package (CUDA Compatibility, "Forward Compatibility")."""
    if host.cuda and version_numbers(host.cuda) >= version_numbers(needs.cuda):
        return
    remedy = f"install driver {needs.min_driver} or newer, or build with a TensorRT for the CUDA of this driver"
    if host.cuda:
        why = f"the engine needs CUDA {needs.cuda}, the driver here serves {host.cuda}"
        yield Mismatch("gpu.cuda", why, remedy)
    if host.driver and version_numbers(host.driver) < version_numbers(needs.min_driver):
        why = f"the engine needs NVIDIA driver {needs.min_driver} or newer, here is {host.driver}"
        yield Mismatch("gpu.driver_version", why, remedy)


def _capability(needs: GpuNeeds, gpus: tuple[HostGpu, ...]) -> Iterator[Mismatch]:
    """Engines run on the first GPU that is visible."""
    first = gpus[0]
    if needs.fits_capability(first.capability):
        return
    why = f"the engine was built for {_wanted(needs)}, this GPU is {sm(first.capability)} ({first.name})"
    fitting = [str(index) for index, gpu in enumerate(gpus) if needs.fits_capability(gpu.capability)]
    other = f"set CUDA_VISIBLE_DEVICES to the GPU with number {fitting[0]} here" if fitting else "run it on such a GPU"
    yield Mismatch("gpu.compute_capability", why, f"{other}, or {REBUILD}")


def _memory(needs: GpuNeeds, gpus: tuple[HostGpu, ...]) -> Iterator[Mismatch]:
    first = gpus[0]
    if needs.memory_bytes > first.memory_bytes:
        why = f"the engine needs {needs.memory_bytes / 1e9:.2f} GB, {first.name} has {first.memory_bytes / 1e9:.2f} GB"
        yield Mismatch(
            "gpu.memory", why, "build it with a smaller --max-batch, --max-seq-len or a recipe of fewer bits"
        )


CHECKS: tuple[Callable[[GpuNeeds, tuple[HostGpu, ...]], Iterator[Mismatch]], ...] = (_capability, _memory)
