"""The NVIDIA GPUs, driver and runtimes of this machine, asked of the driver's library and of package metadata alone."""

import ctypes
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from exporter.core.packages import installed_version

LIBRARY = "libcuda.so.1"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
SUCCESS = 0
# CUdevice_attribute of cuda.h (CUDA driver API, "Device Management").
MAJOR, MINOR = 75, 76
NAME_BYTES = 256

# A runtime and the distributions that bring it; the first one installed tells its version.
TOOLKITS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": (
        "tensorrt-rtx",
        "tensorrt-rtx-cu13",
        "tensorrt-rtx-cu12",
        "tensorrt-rtx-cu13-bindings",
        "tensorrt-rtx-cu12-bindings",
    ),
}


@dataclass(frozen=True)
class HostGpu:
    """One GPU: its compute capability (`8.9`) and all of its memory in bytes."""

    name: str
    capability: str
    memory_bytes: int


@dataclass(frozen=True)
class GpuHost:
    """What engines for GPUs find here: `cuda` is the newest CUDA that the driver serves (`13.0`), `driver` its own
    version (`580.65.06`), both empty without one; `toolkits` are the versions of the runtimes installed."""

    cuda: str = ""
    driver: str = ""
    gpus: tuple[HostGpu, ...] = ()
    toolkits: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_driver(self) -> bool:
        return bool(self.cuda or self.driver)

    def describe(self) -> str:
        """`NVIDIA H200 (SM90, 139.8 GiB), driver 580.65.06, CUDA 13.0`, or what is missing of it."""
        if not self.has_driver:
            return "no NVIDIA driver"
        gpus = [f"{gpu.name} ({sm(gpu.capability)}, {gpu.memory_bytes / 2**30:.1f} GiB)" for gpu in self.gpus]
        found = [", ".join(gpus) or "no GPU"]
        found += [f"driver {self.driver}"] if self.driver else []
        found += [f"CUDA {self.cuda}"] if self.cuda else []
        return ", ".join(found)


def sm(capability: str) -> str:
    """NVIDIA's word for a compute capability: `8.9` -> `SM89`."""
    return f"SM{capability.replace('.', '')}"


def version_numbers(version: str) -> tuple[int, ...]:
    """`1.7.1.116` -> (1, 7, 1, 116), to compare; what follows the first part that is no number is left out."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def gpu_host() -> GpuHost:
    """This machine, asked once; never raises. CUDA_VISIBLE_DEVICES hides GPUs from it as from every other user."""
    return _this_machine()


@cache
def _this_machine() -> GpuHost:
    return read_host(open_driver(), DRIVER_VERSION)


def read_host(driver: Any | None, version_file: Path, toolkits: Mapping[str, str] | None = None) -> GpuHost:
    """A machine's facts. `driver` is CUDA's driver library or what stands in for it; None: there is none."""
    installed = installed_toolkits() if toolkits is None else toolkits
    if driver is None:
        return GpuHost(toolkits=installed)
    version = read_driver_version(version_file)
    try:
        return GpuHost(_cuda_version(driver), version, tuple(_gpus(driver)), installed)
    except (OSError, AttributeError, ctypes.ArgumentError):
        return GpuHost("", version, (), installed)


def open_driver() -> Any | None:
    """The driver's library; None where there is none, or it does not load."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        return None


def read_driver_version(file: Path = DRIVER_VERSION) -> str:
    """The kernel module's version from its own file: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...`,
    or with `Open Kernel Module for x86_64` in the middle; empty where there is none."""
    try:
        text = file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    first = next((line for line in text.splitlines() if line.startswith("NVRM version")), "")
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", first)
    return found.group(1) if found else ""


def installed_toolkits(wanted: Iterable[str] = tuple(TOOLKITS)) -> dict[str, str]:
    """The versions of the runtimes that are installed, from package metadata; nothing is imported."""
    found = {}
    for toolkit in wanted:
        versions = (installed_version(name) for name in TOOLKITS[toolkit])
        if version := next((version for version in versions if version), ""):
            found[toolkit] = version
    return found


def cuda_of_toolkit(toolkit: str) -> str:
    """The CUDA major version that an installed runtime was made with (`13`), told by its packages' names."""
    for name in TOOLKITS[toolkit]:
        made_with = re.search(r"-cu(\d+)", name)
        if made_with and installed_version(name):
            return made_with.group(1)
    return ""


def _cuda_version(driver: Any) -> str:
    """cuDriverGetVersion gives 1000 * major + 10 * minor, without initialisation."""
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)) != SUCCESS:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpus(driver: Any) -> Iterable[HostGpu]:
    """Every GPU that answers; none where the driver does not start (no device node, another library's version)."""
    count = ctypes.c_int(0)
    if driver.cuInit(0) != SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != SUCCESS:
        return
    for index in range(count.value):
        device = ctypes.c_int(0)
        if driver.cuDeviceGet(ctypes.byref(device), index) == SUCCESS:
            yield _gpu(driver, device)


def _gpu(driver: Any, device: ctypes.c_int) -> HostGpu:
    name = ctypes.create_string_buffer(NAME_BYTES)
    driver.cuDeviceGetName(name, NAME_BYTES, device)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = ".".join(str(_attribute(driver, device, number)) for number in (MAJOR, MINOR))
    return HostGpu(name.value.decode("utf-8", "replace"), capability, memory.value)


def _attribute(driver: Any, device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
    return value.value
