"""Which row of the contract's table a recipe is held to, its KV cache included."""

from dataclasses import replace

import pytest

from calibration.presets import PRESETS, preset
from exporter.core.recipe import CHANNEL, KV_CACHES, Override, Precision, Recipe
from exporter.parity.limits import (
    CACHES,
    FP16,
    FP32,
    INT4_FINE,
    INT6,
    INT8,
    EagerLimits,
    eager_limits,
    engine_limits,
)


def with_cache(name: str, cache: str) -> Recipe:
    return replace(preset(name), kv_cache=cache)


def gates(limits: EagerLimits) -> tuple[float | None, float, float | None, float]:
    return (
        limits.relative_l2_error,
        limits.kl_divergence_mean,
        limits.kl_divergence_max,
        limits.perplexity_ratio,
    )


@pytest.mark.parametrize(
    ("name", "cache", "expected"),
    [
        ("fp32", "fp32", FP32),
        ("fp32", "fp16", (FP16.relative_l2_error, 1e-4, None, 1.001)),
        ("fp32", "bf16", (3e-2, 2e-3, None, 1.005)),
        ("fp32", "int8", (None, 0.003, None, 1.005)),
        ("bf16", "fp16", (3e-2, 2e-3, None, 1.005)),
        ("bf16", "int8", (None, 0.003, None, 1.005)),
        ("int8-weight", "fp16", INT8),
        ("int8-weight", "int8", INT8),
        ("int4-rtn", "fp16", INT4_FINE),
        ("int4-rtn", "int8", INT4_FINE),
    ],
)
def test_the_looser_row_holds(name: str, cache: str, expected: EagerLimits | tuple[float | None, ...]) -> None:
    found = eager_limits(with_cache(name, cache))
    assert gates(found) == (gates(expected) if isinstance(expected, EagerLimits) else expected)
    assert found.why


@pytest.mark.parametrize("group", [32, 128])
def test_the_coarsest_part_chooses_the_row(group: int) -> None:
    int4, int6, int8 = (Precision(kind, group) for kind in ("int4", "int6", "int8"))
    assert gates(eager_limits(Recipe("r", int8, int6, Precision()))) == gates(INT6)
    assert gates(eager_limits(Recipe("r", int4, int6, int6))) != gates(INT6)
    assert INT8.kl_divergence_mean < INT6.kl_divergence_mean < INT4_FINE.kl_divergence_mean
    assert INT8.perplexity_ratio < INT6.perplexity_ratio < INT4_FINE.perplexity_ratio


def test_every_cache_has_a_row() -> None:
    assert set(CACHES) == set(KV_CACHES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_rounded_cache_is_never_held_tighter_than_none(name: str) -> None:
    for cache in ("fp16", "bf16", "int8"):
        for integer in (True, False):
            plain = engine_limits(with_cache(name, "fp32"), rounded_activations=integer)
            rounded = engine_limits(with_cache(name, cache), rounded_activations=integer)
            assert rounded.simulation >= plain.simulation and rounded.consistency >= plain.consistency
            assert rounded.simulation == (1e-2 if integer else 1e-3)


@pytest.mark.parametrize(
    ("precision", "divergence", "ratio"),
    [
        (Precision("int8", CHANNEL), 0.003, 1.005),
        (Precision("int8", CHANNEL, activations="int8/token"), 0.02, 1.01),
        (Precision("fp8", 0), 0.02, 1.01),
        (Precision("fp8", CHANNEL, activations="fp8/token"), 0.02, 1.01),
        (Precision("nf4", 32), 0.05, 1.05),
        (Precision("nf4", 64), 0.10, 1.10),
        (Precision("int4", CHANNEL), 0.10, 1.10),
        (Precision("int4", 32, activations="int8/token"), 0.05, 1.05),
        (Precision("int4", 128, activations="int8/token"), 0.10, 1.10),
        (Precision("int4", 128, activations="fp8/tensor"), 0.10, 1.10),
        (Precision("nvfp4", 16), 0.15, 1.15),
        (Precision("nvfp4", 16, activations="nvfp4/tensor"), 0.15, 1.15),
        (Precision("mxfp4", 32), 0.15, 1.15),
    ],
)
def test_the_contracts_rows(precision: Precision, divergence: float, ratio: float) -> None:
    recipe = Recipe("r", precision, Precision("bf16"), Precision())
    assert gates(eager_limits(recipe)) == (None, divergence, None, ratio)
    assert gates(eager_limits(replace(recipe, kv_cache="fp8"))) == (None, divergence, None, ratio)


def test_one_coarse_layer_chooses_the_row_of_a_mixed_recipe() -> None:
    int8, fp4 = Precision("int8", 32), Precision("nvfp4", 16)
    mixed = Recipe("auto", int8, int8, int8, overrides=(Override("layers.3.*", fp4),))
    assert gates(eager_limits(mixed)) == gates(eager_limits(Recipe("r", fp4, fp4, fp4)))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_activations_have_one_limit(kind: str) -> None:
    recipe = Recipe("r", Precision(kind, CHANNEL, activations=f"{kind}/token"), Precision(), Precision())
    found = engine_limits(recipe, rounded_activations=True)
    assert found.simulation == found.consistency == 1e-2
    assert engine_limits(recipe, rounded_activations=False).simulation == 1e-3
