"""Which TensorRT is taken, and what is said where none can be."""

import sys
from types import ModuleType

import pytest

from exporter.core.errors import InputError, UnsupportedError
from exporter.core.gpu import GpuHost, HostGpu
from targets.tensorrt import toolkit as toolkits
from targets.tensorrt.toolkit import find_toolkit, load_toolkit, probe_toolkit

NO_GPU = GpuHost()
GPU = GpuHost("13.0", "580.65.06", (HostGpu("NVIDIA H200", "9.0", 150 * 10**9),))
BOTH = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], real: bool = True) -> None:
    """Modules of these names and versions, and metadata that names them."""
    monkeypatch.delenv("ENGINESMITH_TENSORRT", raising=False)
    monkeypatch.setattr(toolkits, "installed_toolkits", lambda names: {n: versions[n] for n in names if n in versions})
    monkeypatch.setattr(toolkits, "_has_library", lambda version: real)
    for name in BOTH:
        module = ModuleType(name)
        module.__dict__["__version__"] = versions.get(name, "")
        monkeypatch.setitem(sys.modules, name, module if name in versions else None)


@pytest.mark.parametrize(
    ("versions", "host", "chosen"),
    [
        (BOTH, GPU, "tensorrt"),
        (BOTH, NO_GPU, "tensorrt_rtx"),
        ({"tensorrt_rtx": "1.7.1.116"}, GPU, "tensorrt_rtx"),
        ({"tensorrt": "11.4.0.106"}, NO_GPU, "tensorrt"),
    ],
)
def test_which_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], host: GpuHost, chosen: str
) -> None:
    pretend(monkeypatch, versions)
    assert find_toolkit(host).name == chosen
    assert probe_toolkit(host).usable


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, BOTH)
    monkeypatch.setenv("ENGINESMITH_TENSORRT", "rtx")
    assert find_toolkit(GPU).label == "TensorRT-RTX 1.7.1.116"
    monkeypatch.setenv("ENGINESMITH_TENSORRT", "tensorrt")
    assert find_toolkit(NO_GPU).label == "TensorRT 11.4.0.106"
    monkeypatch.setenv("ENGINESMITH_TENSORRT", "lean")
    with pytest.raises(InputError, match="'lean'"):
        find_toolkit(GPU)
    assert not probe_toolkit(GPU).usable


def test_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    with pytest.raises(UnsupportedError) as refused:
        find_toolkit(NO_GPU)
    assert refused.value.kind == "tensorrt.missing"
    support = probe_toolkit(NO_GPU)
    assert not support.usable
    assert "enginesmith[tensorrt-rtx]" in support.remedy and "enginesmith[tensorrt]" in support.remedy


def test_one_that_is_too_old_or_broken_is_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"tensorrt": "10.9.0.34"})
    with pytest.raises(UnsupportedError, match="older than 11") as refused:
        find_toolkit(GPU)
    assert refused.value.kind == "tensorrt.old"
    pretend(monkeypatch, {"tensorrt": "11.4.0.106"}, real=False)
    with pytest.raises(UnsupportedError, match="placeholders") as refused:
        find_toolkit(GPU)
    assert refused.value.kind == "tensorrt.broken"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnsupportedError, match="does not load"):
        load_toolkit("tensorrt")


def test_a_broken_one_does_not_hide_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, BOTH, real=False)
    assert find_toolkit(GPU).name == "tensorrt_rtx"


def test_the_driver_that_its_cuda_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, BOTH)
    for cuda, driver in (("13", "580"), ("12", "525"), ("", "580")):
        monkeypatch.setattr(toolkits, "cuda_of_toolkit", lambda name, cuda=cuda: cuda)
        assert find_toolkit(GPU).min_driver == driver
