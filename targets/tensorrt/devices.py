"""The GPUs that engines are built for: named by compute capability, or the one of this machine."""

from dataclasses import dataclass

from exporter.core.device import DeviceOptions
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.gpu import GpuHost, gpu_host, sm, version_numbers
from exporter.core.gpu_needs import LABELS
from targets.gpu_names import DEVICES, split
from targets.tensorrt.toolkit import EXTRA, RTX, TENSORRT, Toolkit

CURRENT = "current"
# RTX's own default where no compute capability is set: "8.0, 8.6, 8.9, 12.0, and later" (NVIDIA, "CPU-Only AOT and
# TensorRT-RTX Engines"); TensorRT's AMPERE_PLUS begins there too.
PORTABLE = "8.0"


@dataclass(frozen=True)
class BuildDevice:
    """What one engine is built for, by which toolkit. `portable`: no compute capability is set, RTX's default."""

    toolkit: str
    capabilities: tuple[str, ...]
    current: bool = False
    portable: bool = False

    @property
    def label(self) -> str:
        """`SM89`, `SM89 and SM120`, `SM80 and newer`."""
        return " and ".join(map(sm, self.capabilities)) + (" and newer" if self.portable else "")


def device_names() -> dict[str, str]:
    """What `--device` takes, each with one sentence; several are joined by commas where RTX builds."""
    rest = {True: "", False: "; TensorRT alone, on such a GPU"}
    names = {
        name: f"{device.summary}{rest[device.in_rtx]} (compute capability {device.capability})"
        for name, device in DEVICES.items()
    }
    return {CURRENT: "the GPU of this machine (default)", **names}


def resolve_device(
    options: DeviceOptions, toolkit: Toolkit, engine: EngineOptions = PLAIN, host: GpuHost | None = None
) -> BuildDevice:
    """The device that options ask for, with what a toolkit can do about it. `host`: its GPUs, if not this machine's.

    Raises InputError for unknown names, UnsupportedError for GPUs that this toolkit cannot build for here.
    """
    host = host or gpu_host()
    refuse_flags(options, engine, toolkit)
    names = split_names(options.device)
    if toolkit.name == TENSORRT:
        return _on_this_gpu(names, toolkit, engine, host)
    if names:
        return BuildDevice(RTX, tuple(_rtx_capability(name) for name in names))
    if engine.hardware_compatible:
        return BuildDevice(RTX, (PORTABLE,), portable=True)
    return _rtx_on_this_gpu(host)


def split_names(device: str | None) -> tuple[str, ...]:
    """`sm89,sm120` -> its names, each known and given once; nothing and `current` are none."""
    names = split(device or CURRENT)
    for name in names:
        if name not in DEVICES and name != CURRENT:
            raise InputError("device.unknown", f"device {name!r} is unknown", f"use one of {', '.join(device_names())}")
    if len(set(names)) < len(names) or (CURRENT in names and len(names) > 1):
        raise InputError("device.several", f"--device {device} names a GPU twice", "name each once, or only `current`")
    return () if names == (CURRENT,) else names


def refuse_flags(options: DeviceOptions, engine: EngineOptions, toolkit: Toolkit) -> None:
    """Raise UnsupportedError for options that this toolkit cannot honour."""
    if foreign := [flag for flag in options.given if flag != "--device"]:
        why = f"target tensorrt takes no {', '.join(foreign)}: they are for CPUs"
        raise UnsupportedError("target.device", why, f"leave {', '.join(foreign)} out, and name a GPU with --device")
    if not toolkit.is_rtx:
        return
    label = LABELS[RTX]
    if engine.version_compatible:
        why = f"engines of {label} load in the version that built them and in no other: no --version-compatible"
        raise UnsupportedError("tensorrt.version_compatible", why, f"leave it out, or build with {EXTRA[TENSORRT]}")
    if engine.timing_cache is not None:
        why = f"{label} times no kernels when it builds: --timing-cache would have no effect"
        raise UnsupportedError("tensorrt.timing_cache", why, "leave it out")
    if engine.hardware_compatible and options.device is not None:
        why = f"{label} builds for the GPUs that --device names, or with --hardware-compatible alone for SM80 and newer"
        remedy = "leave one of them out; --device sm86,sm89,sm120 names several"
        raise UnsupportedError("tensorrt.hardware_compatible", why, remedy)


def named_capabilities(options: DeviceOptions, host: GpuHost | None = None) -> tuple[str, ...]:
    """The compute capabilities that options mean, whatever is installed: of the first GPU here where none is named,
    and none where there is no GPU either. Raises InputError for unknown names."""
    if names := split_names(options.device):
        return tuple(DEVICES[name].capability for name in names)
    return tuple(gpu.capability for gpu in (host or gpu_host()).gpus[:1])


def _rtx_capability(name: str) -> str:
    device = DEVICES[name]
    if not device.in_rtx:
        raise _not_in_rtx(device.capability, f"--device {name}")
    return device.capability


def _not_in_rtx(capability: str, asked: str) -> UnsupportedError:
    why = f"{LABELS[RTX]} does not compile for {sm(capability)} ({asked})"
    return UnsupportedError("device.toolkit", why, f"build on a machine with such a GPU, with {EXTRA[TENSORRT]}")


def _rtx_on_this_gpu(host: GpuHost) -> BuildDevice:
    if not host.gpus:
        why = "no --device is given, and this machine has no GPU to build for"
        raise UnsupportedError("device.none", why, f"name one, as in --device sm89: {', '.join(DEVICES)}")
    gpu = host.gpus[0]
    if gpu.capability not in {device.capability for device in DEVICES.values() if device.in_rtx}:
        raise _not_in_rtx(gpu.capability, gpu.name)
    return BuildDevice(RTX, (gpu.capability,), current=True)


def _on_this_gpu(names: tuple[str, ...], toolkit: Toolkit, engine: EngineOptions, host: GpuHost) -> BuildDevice:
    """TensorRT times kernels, so it builds for the GPU it runs on alone."""
    rtx = f"build there, or for other GPUs with {EXTRA[RTX]}"
    if not host.gpus:
        why = f"{toolkit.label} builds for the GPU it runs on, and this machine has none"
        raise UnsupportedError("device.none", why, rtx)
    gpu = host.gpus[0]
    if wrong := [name for name in names if DEVICES[name].capability != gpu.capability]:
        why = f"{toolkit.label} builds for the GPU it runs on alone, {sm(gpu.capability)} ({gpu.name})"
        raise UnsupportedError("device.toolkit", f"{why}, not for {', '.join(wrong)}", rtx)
    if engine.hardware_compatible and version_numbers(gpu.capability) < version_numbers(PORTABLE):
        why = f"hardware-compatible engines begin at {sm(PORTABLE)}, this GPU is {sm(gpu.capability)}"
        raise UnsupportedError("tensorrt.hardware_compatible", why, "leave --hardware-compatible out")
    return BuildDevice(TENSORRT, (gpu.capability,), current=True)
