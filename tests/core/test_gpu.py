"""The facts of GPU hosts, read through a stand-in for CUDA's driver library."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from exporter.core import gpu
from exporter.core.gpu import GpuHost, HostGpu, read_driver_version, read_host, version_numbers

H200 = HostGpu("NVIDIA H200", "9.0", 150_109_880_320)
L4 = HostGpu("NVIDIA L4", "8.9", 23_659_347_968)


class FakeDriver:
    """The functions of libcuda that are called, for a list of GPUs; `fails` names those that return an error."""

    def __init__(self, gpus: tuple[HostGpu, ...], version: int = 13000, fails: tuple[str, ...] = ()) -> None:
        self.gpus, self.version, self.fails = gpus, version, fails

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 100 if name in self.fails else getattr(self, f"fake_{name}")(*arguments)

    def fake_cuInit(self, flags: int) -> int:
        assert flags == 0
        return 0

    def fake_cuDriverGetVersion(self, out: Any) -> int:
        return write(out, self.version)

    def fake_cuDeviceGetCount(self, out: Any) -> int:
        return write(out, len(self.gpus))

    def fake_cuDeviceGet(self, out: Any, index: int) -> int:
        return write(out, index + 7)

    def fake_cuDeviceGetName(self, out: Any, size: int, device: ctypes.c_int) -> int:
        out.value = self.gpus[device.value - 7].name.encode()[: size - 1]
        return 0

    def fake_cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        return write(out, self.gpus[device.value - 7].memory_bytes)

    def fake_cuDeviceGetAttribute(self, out: Any, number: int, device: ctypes.c_int) -> int:
        major, minor = self.gpus[device.value - 7].capability.split(".")
        return write(out, int({75: major, 76: minor}[number]))


def write(out: Any, value: int) -> int:
    out._obj.value = value
    return 0


@pytest.fixture
def version_file(tmp_path: Path) -> Path:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)  "
        "Sun Jul 27 07:10:58 UTC 2025\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    return file


def test_two_gpus_are_read(version_file: Path) -> None:
    host = read_host(FakeDriver((H200, L4)), version_file, {"tensorrt": "11.4.0.106"})
    assert host == GpuHost("13.0", "580.65.06", (H200, L4), {"tensorrt": "11.4.0.106"})
    assert host.describe() == ("NVIDIA H200 (SM90, 139.8 GiB), NVIDIA L4 (SM89, 22.0 GiB), driver 580.65.06, CUDA 13.0")


def test_a_driver_that_does_not_start_has_no_gpus(version_file: Path) -> None:
    host = read_host(FakeDriver((L4,), 12080, ("cuInit",)), version_file, {})
    assert host == GpuHost("12.8", "580.65.06", (), {}) and host.has_driver
    assert read_host(FakeDriver((L4,), fails=("cuDriverGetVersion",)), version_file, {}).cuda == ""


def test_a_library_without_the_functions_has_none(version_file: Path) -> None:
    assert read_host(object(), version_file, {}) == GpuHost("", "580.65.06", (), {})


def test_no_driver(tmp_path: Path) -> None:
    host = read_host(None, tmp_path / "absent", {})
    assert host == GpuHost() and not host.has_driver and host.describe() == "no NVIDIA driver"


def test_this_machine_is_read_once_and_raises_nothing() -> None:
    assert gpu.gpu_host() is gpu.gpu_host()


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57  Release Build", "575.57"),
        ("NVRM version: something else", ""),
        ("", ""),
    ],
)
def test_driver_versions(tmp_path: Path, line: str, version: str) -> None:
    file = tmp_path / "version"
    file.write_text(line + "\n")
    assert read_driver_version(file) == version


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("10.2") > version_numbers("9.15") > version_numbers("9.2rc1") == (9, 2)
    assert version_numbers("unknown") == ()


def test_toolkits_come_from_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt-rtx": "1.7.1.116", "tensorrt-rtx-cu13": "1.7.1.116", "tensorrt-cu12": "11.4.0.106"}
    monkeypatch.setattr(gpu, "installed_version", lambda name: installed.get(name, ""))
    assert gpu.installed_toolkits() == {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}
    assert gpu.cuda_of_toolkit("tensorrt_rtx") == "13" and gpu.cuda_of_toolkit("tensorrt") == "12"
