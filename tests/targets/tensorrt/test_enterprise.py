"""TensorRT's own path, which times kernels on a GPU: what is asked of its module, with TensorRT-RTX's real parser and
builder behind a module that has what `tensorrt` 11.4 has and nothing that RTX has alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.core.errors import InputError
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.plan_build import build_here
from targets.tensorrt.plan_report import EngineRequest
from targets.tensorrt.profiles import Profile
from targets.tensorrt.toolkit import Toolkit
from tests.targets.tensorrt.typed_graphs import Decoder, save

rtx = pytest.importorskip("tensorrt_rtx")

PROFILES = (Profile("decode", (1, 1, 4), (1, 1, 1)), Profile("prefill", (1, 1, 4), (1, 16, 32)))
HOPPER = BuildDevice("tensorrt", ("9.0",), current=True)
MEASURED = b"what was measured on this GPU"


class FakeCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"|" + MEASURED


class FakeConfig:
    """Records what is set, and passes on what RTX takes too. RTX's own compute capabilities are not there."""

    def __init__(self, real: Any, rejects: bytes) -> None:
        self.__dict__.update(real=real, rejects=rejects, flags=[], set={}, cache=None)

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag.name)

    def create_timing_cache(self, data: bytes) -> FakeCache:
        return FakeCache(data)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.__dict__["cache"] = cache
        return cache.data != self.rejects

    def get_timing_cache(self) -> FakeCache:
        cache: FakeCache = self.cache
        return cache

    def add_optimization_profile(self, profile: Any) -> int:
        return int(self.real.add_optimization_profile(profile))

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in ("progress_monitor", "hardware_compatibility_level", "profiling_verbosity"), name
        self.set[name] = value


class FakeBuilder:
    """Builds nothing: the plan is a word, written in two pieces after one step of progress."""

    def __init__(self, module: "FakeTensorRT", logger: Any) -> None:
        self.module, self.real = module, rtx.Builder(logger)

    def create_network(self, flags: int) -> Any:
        return self.real.create_network(flags)

    def create_optimization_profile(self) -> Any:
        return self.real.create_optimization_profile()

    def create_builder_config(self) -> FakeConfig:
        self.module.config = FakeConfig(self.real.create_builder_config(), self.module.rejects)
        return self.module.config

    def build_serialized_network_to_stream(self, network: Any, config: FakeConfig, writer: Any) -> bool:
        monitor = config.set["progress_monitor"]
        monitor.phase_start("Building engine", None, 2)
        if not monitor.step_complete("Building engine", 0):
            return False
        assert writer.write(b"pl") == 2 and writer.write(b"an") == 2
        return True


class FakeRuntime:
    """Loads the plan and shows its kernels as TensorRT's developer guide prints them."""

    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> "FakeRuntime":
        assert plan == b"plan" and self.engine_host_code_allowed
        return self

    def create_engine_inspector(self) -> "FakeRuntime":
        return self

    def get_engine_information(self, form: Any) -> str:
        assert form == rtx.LayerInformationFormat.JSON
        codes = [{"Name": "x", "Dimensions": [16, 512], "Format/Datatype": "Row major linear FP8 format"}]
        product = {"Name": "layers.0.q.matmul_myl1_2", "LayerType": "gemm", "Inputs": codes, "Constants": codes}
        return json.dumps({"Layers": [product, "a name alone"], "Bindings": ["input_ids"]})


class FakeTensorRT:
    """A module `tensorrt`: RTX's classes without `ComputeCapability`, and a builder that needs no GPU."""

    __version__ = "11.4.0.106"

    def __init__(self, rejects: bytes = b"of another version") -> None:
        self.rejects = rejects
        self.config: FakeConfig

    def __getattr__(self, name: str) -> Any:
        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(rtx, name)

    def Runtime(self, logger: Any) -> "FakeRuntime":
        return FakeRuntime()

    def Builder(self, logger: Any) -> FakeBuilder:
        return FakeBuilder(self, logger)


def build(folder: Path, module: FakeTensorRT, request: EngineRequest) -> Any:
    model = save(Decoder("fp8", layers=1).model(), folder)
    toolkit = Toolkit("tensorrt", module.__version__, module)
    return build_here(toolkit, model, request, folder / "engine.plan", lambda fraction, detail: None)


def test_a_plan_for_the_gpu_at_hand(tmp_path: Path) -> None:
    module = FakeTensorRT()
    report = build(tmp_path, module, EngineRequest(HOPPER, PROFILES))
    assert (tmp_path / "engine.plan").read_bytes() == b"plan" and report.plan_bytes == 4
    assert report.built_by == "TensorRT 11.4.0.106 for SM90" and report.flags == []
    assert report.requirements["toolkit"] == "tensorrt" and report.requirements["compute_capabilities"] == ["9.0"]
    assert report.layers["precisions"]["MATRIX_MULTIPLY"] == {"FP8": 4, "HALF": 1}
    assert module.config.flags == [] and "hardware_compatibility_level" not in module.config.set
    assert module.config.set["profiling_verbosity"] == rtx.ProfilingVerbosity.DETAILED
    assert module.config.real.num_optimization_profiles == 2
    assert report.kernels == {"prefill": {"kernels": {"gemm": 1}, "products": {"FP8": 1}, "attention": {}}}


def test_compatible_plans(tmp_path: Path) -> None:
    module = FakeTensorRT()
    request = EngineRequest(HOPPER, PROFILES, version_compatible=True, hardware_compatible=True)
    report = build(tmp_path, module, request)
    assert module.config.flags == ["VERSION_COMPATIBLE"]
    assert module.config.set["hardware_compatibility_level"] == rtx.HardwareCompatibilityLevel.AMPERE_PLUS
    assert report.flags == ["version_compatible", "hardware_compatible"]
    # FP8 does not go down to Ampere, whatever the flag says.
    assert report.requirements["compute_capabilities"] == ["8.9"]
    assert report.requirements["version_compatible"] is True


def test_a_timing_cache_is_read_and_extended(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    request = EngineRequest(HOPPER, PROFILES, timing_cache=file)
    assert build(tmp_path, FakeTensorRT(), request).flags == ["timing_cache"]
    assert file.read_bytes() == b"|" + MEASURED
    build(tmp_path, FakeTensorRT(), request)
    assert file.read_bytes() == b"|" + MEASURED + b"|" + MEASURED
    assert sorted(found.name for found in tmp_path.iterdir() if "cache" in found.name) == ["timing.cache"]


def test_a_timing_cache_of_another_gpu_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "timing.cache"
    file.write_bytes(b"of another version")
    with pytest.raises(InputError, match="no timing cache of this") as refused:
        build(tmp_path, FakeTensorRT(), EngineRequest(HOPPER, PROFILES, timing_cache=file))
    assert refused.value.kind == "tensorrt.timing_cache"
    assert file.read_bytes() == b"of another version" and not (tmp_path / "engine.plan").exists()


def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "absent" / "timing.cache"):
        with pytest.raises(InputError, match="cannot be written"):
            build(tmp_path, FakeTensorRT(), EngineRequest(HOPPER, PROFILES, timing_cache=file))
