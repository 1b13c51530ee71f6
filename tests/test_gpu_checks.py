"""What doctor says of GPUs and TensorRT."""

import pytest

from exporter import gpu_checks
from exporter.core.errors import UnsupportedError
from exporter.core.gpu import GpuHost, HostGpu
from targets.tensorrt import probe, toolkit

H200 = GpuHost("13.0", "580.65.06", (HostGpu("NVIDIA H200", "9.0", 150 * 10**9),), {"tensorrt": "11.4.0.106"})


def checks_of(host: GpuHost) -> dict[str, gpu_checks.Check]:
    return {check.name: check for check in gpu_checks.gpu_checks(host)}


def test_a_machine_without_a_gpu() -> None:
    checks = checks_of(GpuHost())
    assert not checks["gpu"].passed and checks["gpu"].detail == "no NVIDIA driver"
    assert "--device sm89" in checks["gpu"].remedy
    for check in checks.values():
        assert check.required is False
        assert check.passed or check.remedy, check.name


def test_a_machine_with_one() -> None:
    gpu = checks_of(H200)["gpu"]
    assert gpu.passed and gpu.detail.startswith("NVIDIA H200 (SM90") and not gpu.remedy


def test_rtx_builds_a_layer_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("ENGINESMITH_TENSORRT", "rtx")
    check = gpu_checks.builder_check(GpuHost())
    assert check.passed and check.detail.startswith("TensorRT-RTX 1.") and check.detail.endswith(" builds")


def test_a_builder_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "find_toolkit", lambda host: toolkit.Toolkit("tensorrt", "11.4.0.106", None))
    monkeypatch.setattr(probe, "build_one_layer", lambda found: "no CUDA-capable device is detected")
    check = gpu_checks.builder_check(H200)
    assert not check.passed and "no CUDA-capable device" in check.detail and "ENGINESMITH_TENSORRT=rtx" in check.remedy


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(host: GpuHost) -> toolkit.Toolkit:
        raise UnsupportedError("tensorrt.missing", "TensorRT-RTX is not installed", "pip install it")

    monkeypatch.setattr(toolkit, "find_toolkit", missing)
    check = gpu_checks.builder_check(GpuHost())
    assert not check.passed and check.remedy == "pip install it"
