"""Which builds are tried on which GPU, told on a machine without one."""

import sys
from types import ModuleType

import pytest

from exporter.core.gpu import HostGpu, gpu_host
from targets.tensorrt.toolkit import RTX, TENSORRT, Toolkit
from tests.gpu.building import Tried, candidates, describe, try_builds
from tests.targets.tensorrt.contract_engines import contract_engine

H200 = HostGpu("NVIDIA H200", "9.0", 139 << 30)
L4 = HostGpu("NVIDIA L4", "8.9", 23 << 30)


def toolkit(name: str) -> Toolkit:
    return Toolkit(name, "1.7.1.116", ModuleType(name))


def test_tensorrt_builds_for_the_gpu_at_hand():
    (only,) = candidates(toolkit(TENSORRT), H200)
    assert only.flags == () and only.device.capabilities == ("9.0",) and only.device.current


def test_rtx_builds_for_a_gpu_that_it_names():
    (only,) = candidates(toolkit(RTX), L4)
    assert only.flags == ("--device", "sm89") and only.device.capabilities == ("8.9",)


def test_rtx_on_hopper_tries_many_at_once_then_each():
    builds = candidates(toolkit(RTX), H200)
    assert builds[0].flags == ("--hardware-compatible",) and builds[0].device.portable
    named = [build.flags[1] for build in builds[1:]]
    assert "sm90" not in named and named.index("sm120") < named.index("sm89") < named.index("sm80")


def test_without_a_gpu_each_try_says_so(tiny_checkpoint, tmp_path):
    """The builds themselves are real; what refuses is the runtime."""
    if gpu_host().gpus:
        pytest.skip("there is a GPU")
    module = pytest.importorskip("tensorrt_rtx")
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path)
    found = Toolkit(RTX, module.__version__, module)
    (tried,) = try_builds(candidates(found, L4), engine, found, tmp_path)
    assert "needs an NVIDIA GPU" in tried.refused and "cuda" not in sys.modules
    told = describe(L4, found, [tried, Tried(tried.build, "")])
    assert told.startswith("TensorRT-RTX 1.7.1.116 on NVIDIA L4 (SM89): --device sm89: the engine needs")
    assert told.endswith("--device sm89: runs")
