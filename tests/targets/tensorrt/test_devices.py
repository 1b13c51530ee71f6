"""Which GPUs are built for by which toolkit, and what is refused with which words."""

from pathlib import Path

import pytest

from exporter.core.device import THIS_MACHINE, DeviceOptions
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.errors import EngineSmithError, InputError, UnsupportedError
from exporter.core.gpu import GpuHost, HostGpu
from targets.tensorrt.devices import (
    BuildDevice,
    device_names,
    named_capabilities,
    resolve_device,
)
from targets.tensorrt.toolkit import Toolkit

RTX = Toolkit("tensorrt_rtx", "1.7.1.116", None)
TENSORRT = Toolkit("tensorrt", "11.4.0.106", None)
NO_GPU = GpuHost()
L4 = GpuHost("13.0", "580.65.06", (HostGpu("NVIDIA L4", "8.9", 24 * 10**9),))
H200 = GpuHost("13.0", "580.65.06", (HostGpu("NVIDIA H200", "9.0", 150 * 10**9),))
T4 = GpuHost("13.0", "580.65.06", (HostGpu("Tesla T4", "7.5", 16 * 10**9),))


@pytest.mark.parametrize(
    ("device", "engine", "toolkit", "host", "built_for", "label"),
    [
        ("sm89", PLAIN, RTX, NO_GPU, BuildDevice("tensorrt_rtx", ("8.9",)), "SM89"),
        ("sm89, sm120", PLAIN, RTX, NO_GPU, BuildDevice("tensorrt_rtx", ("8.9", "12.0")), "SM89 and SM120"),
        # A named GPU is built for whatever this machine has.
        ("sm86", PLAIN, RTX, H200, BuildDevice("tensorrt_rtx", ("8.6",)), "SM86"),
        (None, PLAIN, RTX, L4, BuildDevice("tensorrt_rtx", ("8.9",), current=True), "SM89"),
        ("current", PLAIN, RTX, L4, BuildDevice("tensorrt_rtx", ("8.9",), current=True), "SM89"),
        (
            None,
            EngineOptions(hardware_compatible=True),
            RTX,
            NO_GPU,
            BuildDevice("tensorrt_rtx", ("8.0",), portable=True),
            "SM80 and newer",
        ),
        (None, PLAIN, TENSORRT, H200, BuildDevice("tensorrt", ("9.0",), current=True), "SM90"),
        ("sm90", PLAIN, TENSORRT, H200, BuildDevice("tensorrt", ("9.0",), current=True), "SM90"),
        (
            None,
            EngineOptions(hardware_compatible=True, version_compatible=True, timing_cache=Path("t.cache")),
            TENSORRT,
            H200,
            BuildDevice("tensorrt", ("9.0",), current=True),
            "SM90",
        ),
    ],
)
def test_devices_that_can_be_built_for(
    device: str | None, engine: EngineOptions, toolkit: Toolkit, host: GpuHost, built_for: BuildDevice, label: str
) -> None:
    found = resolve_device(DeviceOptions(device), toolkit, engine, host)
    assert found == built_for and found.label == label


@pytest.mark.parametrize(
    ("options", "engine", "toolkit", "host", "error", "kind", "words", "remedy"),
    [
        (DeviceOptions("sm99"), PLAIN, RTX, NO_GPU, InputError, "device.unknown", "'sm99'", "sm89"),
        (DeviceOptions("sm89,sm89"), PLAIN, RTX, NO_GPU, InputError, "device.several", "twice", "once"),
        (DeviceOptions("current,sm89"), PLAIN, RTX, L4, InputError, "device.several", "twice", "current"),
        (
            DeviceOptions("sm90"),
            PLAIN,
            RTX,
            NO_GPU,
            UnsupportedError,
            "device.toolkit",
            "SM90",
            "enginesmith[tensorrt]",
        ),
        (DeviceOptions("sm89,sm100"), PLAIN, RTX, NO_GPU, UnsupportedError, "device.toolkit", "SM100", "such a GPU"),
        (THIS_MACHINE, PLAIN, RTX, H200, UnsupportedError, "device.toolkit", "NVIDIA H200", "enginesmith[tensorrt]"),
        (THIS_MACHINE, PLAIN, RTX, NO_GPU, UnsupportedError, "device.none", "no GPU", "--device sm89"),
        (DeviceOptions("sm89"), PLAIN, TENSORRT, NO_GPU, UnsupportedError, "device.none", "it runs on", "tensorrt-rtx"),
        (DeviceOptions("sm89"), PLAIN, TENSORRT, H200, UnsupportedError, "device.toolkit", "not for sm89", "rtx"),
        (DeviceOptions(mcpu="apple-m1"), PLAIN, RTX, L4, UnsupportedError, "target.device", "--mcpu", "--device"),
        (
            DeviceOptions("sm89"),
            EngineOptions(version_compatible=True),
            RTX,
            NO_GPU,
            UnsupportedError,
            "tensorrt.version_compatible",
            "no other",
            "enginesmith[tensorrt]",
        ),
        (
            DeviceOptions("sm89"),
            EngineOptions(timing_cache=Path("t.cache")),
            RTX,
            NO_GPU,
            UnsupportedError,
            "tensorrt.timing_cache",
            "no effect",
            "leave it out",
        ),
        (
            DeviceOptions("sm89"),
            EngineOptions(hardware_compatible=True),
            RTX,
            NO_GPU,
            UnsupportedError,
            "tensorrt.hardware_compatible",
            "SM80 and newer",
            "sm86,sm89,sm120",
        ),
        (
            THIS_MACHINE,
            EngineOptions(hardware_compatible=True),
            TENSORRT,
            T4,
            UnsupportedError,
            "tensorrt.hardware_compatible",
            "SM75",
            "leave",
        ),
    ],
)
def test_devices_that_are_refused(
    options: DeviceOptions,
    engine: EngineOptions,
    toolkit: Toolkit,
    host: GpuHost,
    error: type[EngineSmithError],
    kind: str,
    words: str,
    remedy: str,
) -> None:
    with pytest.raises(error) as refused:
        resolve_device(options, toolkit, engine, host)
    assert refused.value.kind == kind
    assert words in refused.value.message and remedy in refused.value.remedy


def test_rtx_names_are_those_it_compiles_for() -> None:
    """The table against the library's own list, where it is installed."""
    rtx = pytest.importorskip("tensorrt_rtx")
    from targets.gpu_names import DEVICES

    known = {name.lower() for name in dir(rtx.ComputeCapability) if name.startswith("SM")}
    assert {name for name, device in DEVICES.items() if device.in_rtx} == known
    assert {"current", *DEVICES} == set(device_names())


def test_capabilities_meant_by_options() -> None:
    assert named_capabilities(DeviceOptions("sm89,sm120"), NO_GPU) == ("8.9", "12.0")
    assert named_capabilities(THIS_MACHINE, H200) == ("9.0",)
    assert named_capabilities(THIS_MACHINE, NO_GPU) == ()
