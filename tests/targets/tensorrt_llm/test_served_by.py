"""GPUs that serve a checkpoint: which recipe each computes, by NVIDIA's tables, and the words of what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.presets import preset
from exporter.core.config import ModelConfig
from exporter.core.device import DeviceOptions
from exporter.core.engine_options import EngineOptions
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Recipe
from exporter.core.support import Support
from targets.base import UNNAMED as PARTS
from targets.gpu_names import DEVICES
from targets.registry import get_target
from targets.tensorrt_llm import shards
from tests.targets.tensorrt_llm.sources import WIDE

UNNAMED = frozenset(PARTS)
Factory = Callable[..., Path]
HF, LEGACY, COMPRESSED = "hf", "trtllm", "compressed-tensors"
ALL = tuple(DEVICES)
# The names of SMs that compute with what a recipe stores: FP8 from Ada on, FP4 from Blackwell on, bf16 from Ampere on.
SERVED = [
    (HF, "fp8", ALL[3:]),
    (HF, "fp8-channel", ALL[3:]),
    (HF, "nvfp4", ALL[5:]),
    (HF, "bf16", ALL[1:]),
    (HF, "int4-awq", ("sm80", "sm86", "sm89", "sm90")),
    (HF, "w4a8", ("sm89", "sm90")),
    (COMPRESSED, "int4-awq", ALL[1:]),
    (COMPRESSED, "int8-smoothquant", ALL[1:]),
    (COMPRESSED, "nvfp4", ALL[5:]),
    (COMPRESSED, "fp16", ALL),
    (LEGACY, "fp16", ALL[1:]),
    (LEGACY, "fp8", ALL[3:]),
]


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Factory) -> ModelConfig:
    return ModelConfig.from_directory(tiny_checkpoint("gqa", **WIDE))


@pytest.mark.parametrize(("form", "name", "served"), SERVED, ids=[f"{form}-{name}" for form, name, _ in SERVED])
def test_each_gpu_takes_what_it_computes(config: ModelConfig, form: str, name: str, served: tuple[str, ...]) -> None:
    target, engine = get_target("tensorrt-llm"), EngineOptions(format=form)
    recipe = target.complete(preset(name), UNNAMED, config, engine)
    assert target.supports(config, recipe, engine=engine).usable
    for device in DEVICES:
        found = target.supports(config, recipe, DeviceOptions(device), engine)
        assert found.usable == (device in served), f"{device}: {found.why}"
        if not found.usable:
            assert DEVICES[device].capability.replace(".", "") in found.why and found.remedy


@pytest.mark.parametrize(
    ("device", "name", "said", "remedy"),
    [
        ("sm80", "fp8", "SM80 cannot compute with fp8, SM89 and later do", "int4-awq"),
        ("sm89", "nvfp4", "SM89 cannot compute with nvfp4, SM100 and later do", "use --recipe fp8"),
        ("sm75", "bf16", "SM75 cannot compute with bf16, SM80 and later do", "use --recipe fp16"),
        ("sm90,sm86", "fp8", "SM86 cannot compute with fp8", "int4-awq"),
        ("sm100", "int4-awq", "not on SM100", "--format compressed-tensors"),
    ],
)
def test_the_gpu_and_a_recipe_that_works_are_told(
    config: ModelConfig, device: str, name: str, said: str, remedy: str
) -> None:
    target = get_target("tensorrt-llm")
    recipe = target.complete(preset(name), UNNAMED, config)
    found = target.supports(config, recipe, DeviceOptions(device))
    assert not found.usable and said in found.why and remedy in found.remedy


def test_a_cache_in_fp8_alone_can_be_left_out(config: ModelConfig) -> None:
    target, engine = get_target("tensorrt-llm"), EngineOptions(format=COMPRESSED)
    named = UNNAMED - {"kv_cache"}
    recipe = target.complete(replace(preset("int4-awq"), kv_cache="fp8"), named, config, engine)
    found = target.supports(config, recipe, DeviceOptions("sm86"), engine)
    assert not found.usable and found.remedy == "leave --kv-cache out"
    assert target.supports(config, recipe, DeviceOptions("sm89"), engine).usable


def test_options_of_cpus_and_unknown_gpus_are_refused() -> None:
    target = get_target("tensorrt-llm")
    with pytest.raises(InputError, match="'sm42' is unknown") as unknown:
        target.check_options(DeviceOptions("sm42"))
    assert "sm89" in unknown.value.remedy
    with pytest.raises(InputError, match="twice"):
        target.check_options(DeviceOptions("sm89,sm89"))
    with pytest.raises(UnsupportedError, match="they are for CPUs") as foreign:
        target.check_options(DeviceOptions(mcpu="znver4"))
    assert foreign.value.kind == "target.device" and "--device sm89" in foreign.value.remedy
    target.check_options(DeviceOptions("sm80, sm89"))
    assert target.devices().keys() == DEVICES.keys()


def test_cuts_are_checked_once(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    check = shards.check

    def counted(config: ModelConfig, recipe: Recipe, engine: EngineOptions) -> Support:
        calls.append(1)
        return check(config, recipe, engine)

    monkeypatch.setattr(shards, "check", counted)
    target, engine = get_target("tensorrt-llm"), EngineOptions(2, format=LEGACY)
    assert target.supports(config, target.complete(preset("fp8"), UNNAMED, config, engine), engine=engine).usable
    assert len(calls) == 1
