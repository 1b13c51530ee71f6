"""Which TensorRT builds and runs engines here: NVIDIA's `tensorrt` 11 or `tensorrt_rtx`, two modules of one interface.

Both are strongly typed and have the same builder, parser and network classes; only RTX has `ComputeCapability`, because
it compiles on any machine for GPUs named by their compute capability, where the other times kernels on the GPU it runs
on. Compared name by name: tensorrt-cu13-bindings 11.4.0.106, tensorrt-rtx-cu13-bindings 1.7.1.116.
"""

import ctypes
import importlib
import os
from dataclasses import dataclass, field
from typing import Any

from exporter.core.errors import EngineSmithError, InputError, UnsupportedError
from exporter.core.gpu import GpuHost, cuda_of_toolkit, gpu_host, installed_toolkits, version_numbers
from exporter.core.gpu_needs import LABELS
from exporter.core.support import Support

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
VARIABLE = "ENGINESMITH_TENSORRT"
CHOICES = {"tensorrt": TENSORRT, "rtx": RTX}
EXTRA = {TENSORRT: "pip install 'enginesmith[tensorrt]'", RTX: "pip install 'enginesmith[tensorrt-rtx]'"}
# TensorRT before 11 is weakly typed by default and lacks what the graphs need; RTX 1.7 is the first with all of it.
OLDEST = {TENSORRT: (11,), RTX: (1, 7)}
# NVIDIA, "CUDA Compatibility", table 1: the oldest driver branch that serves a CUDA major version.
MIN_DRIVERS = {"11": "450", "12": "525", "13": "580"}


@dataclass(frozen=True)
class Toolkit:
    """One imported TensorRT. `module` is `tensorrt` or `tensorrt_rtx`."""

    name: str
    version: str
    module: Any = field(repr=False, compare=False)

    @property
    def is_rtx(self) -> bool:
        return self.name == RTX

    @property
    def label(self) -> str:
        """`TensorRT-RTX 1.7.1.116`."""
        return f"{LABELS[self.name]} {self.version}"

    @property
    def cuda(self) -> str:
        """The major version of CUDA that it was made with; the newest where its packages do not tell."""
        return cuda_of_toolkit(self.name) or max(MIN_DRIVERS, key=int)

    @property
    def min_driver(self) -> str:
        return MIN_DRIVERS.get(self.cuda, MIN_DRIVERS[max(MIN_DRIVERS, key=int)])


def find_toolkit(host: GpuHost | None = None) -> Toolkit:
    """The TensorRT that ENGINESMITH_TENSORRT names, else `tensorrt` where there is a GPU for it, else `tensorrt_rtx`,
    else whichever is installed.

    Raises InputError for an unknown name, UnsupportedError where none is installed, too old, or does not load.
    """
    host = host or gpu_host()
    errors: list[EngineSmithError] = []
    for name in _candidates(host):
        try:
            return load_toolkit(name)
        except UnsupportedError as error:
            errors.append(error)
    installed = [error for error in errors if error.kind != "tensorrt.missing"]
    raise (installed or errors)[0]


def _candidates(host: GpuHost) -> list[str]:
    asked = os.environ.get(VARIABLE, "")
    if asked and asked not in CHOICES:
        choices = " or ".join(CHOICES)
        raise InputError("usage.tensorrt", f"{VARIABLE} is {asked!r}", f"set it to {choices}, or leave it out")
    if asked:
        return [CHOICES[asked]]
    return [TENSORRT, RTX] if host.gpus else [RTX, TENSORRT]


def load_toolkit(name: str) -> Toolkit:
    """Import one of the two. Raises UnsupportedError `tensorrt.missing`, `tensorrt.broken` or `tensorrt.old`."""
    version = installed_toolkits([name]).get(name, "")
    if not version:
        raise UnsupportedError("tensorrt.missing", f"{LABELS[name]} is not installed", _install())
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise _broken(name, version, str(error)) from error
    version = str(getattr(module, "__version__", version))
    if version_numbers(version) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        why = f"{LABELS[name]} {version} is older than {oldest}, the first whose networks hold what engines need"
        raise UnsupportedError("tensorrt.old", why, f"pip install --upgrade, or {EXTRA[name]}")
    if name == TENSORRT and not _has_library(version):
        raise _broken(name, version, "its libraries are placeholders")
    return Toolkit(name, version, module)


def _install() -> str:
    return f"{EXTRA[RTX]} (builds without a GPU), or on a machine with one {EXTRA[TENSORRT]}"


def _broken(name: str, version: str, why: str) -> UnsupportedError:
    message = f"{LABELS[name]} {version} is installed but does not load: {why}"
    return UnsupportedError("tensorrt.broken", message, f"{EXTRA[name]} anew")


def _has_library(version: str) -> bool:
    """Whether libnvinfer is the real one: bindings also import against a library that holds nothing else."""
    try:
        library = ctypes.CDLL(f"libnvinfer.so.{version_numbers(version)[0]}")
    except OSError:
        return False
    return hasattr(library, "getInferLibVersion")


def probe_toolkit(host: GpuHost | None = None) -> Support:
    """Whether a TensorRT can be used here, for `Target.probe`; never raises."""
    try:
        find_toolkit(host)
    except EngineSmithError as error:
        return Support("refused", error.message, error.remedy)
    return Support("native")
