"""What a build hands to the target, without a build: a checkpoint, a recipe, and scales that calibration would find."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from calibration.weight_rows import WeightRows
from exporter.core.checkpoint import Checkpoint
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe
from targets.base import BuildSource, Limits, RowReader

FP8 = Precision("fp8", TENSOR, activations="fp8/tensor")
FP8_CHANNEL = Precision("fp8", CHANNEL, activations="fp8/token")
INT4 = Precision("int4", 128)
W4A8 = Precision("int4", 128, activations="fp8/tensor")
NVFP4 = Precision("nvfp4", 16, activations="nvfp4/tensor")
W8A8 = Precision("int8", CHANNEL, activations="int8/token")
WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""Widths that groups of 128 divide."""


def recipe_of(linear: Precision, kv_cache: str = "bf16", kind: str = "bf16", **changes: Any) -> Recipe:
    return Recipe("test", linear, Precision(kind), Precision(kind), kv_cache=kv_cache, **changes)


def quiet(fraction: float, what: str) -> None:
    assert 0 <= fraction <= 1 and what


def source_of(
    path: Path,
    recipe: Recipe,
    rows: RowReader | None = None,
    input_scales: dict[str, float] | None = None,
    kv_scales: dict[int, tuple[float, float]] | None = None,
    engine: EngineOptions = PLAIN,
) -> BuildSource:
    """Inputs of one product get one scale, as calibration gives them: 0.01 for attention, 0.02 ... by default."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    scales = {
        f"model.layers.{layer}.{name}": 0.01 * (layer + 1) + (0.001 if name.startswith("mlp") else 0)
        for layer in range(config.num_layers)
        for name in config.linear_shapes
    }
    caches = {layer: (0.003 + layer / 100, 0.005) for layer in range(config.num_layers)}
    source = BuildSource(
        config=config,
        recipe=recipe,
        model=cast(Any, None),
        checkpoint=checkpoint,
        rows=rows or WeightRows(checkpoint),
        limits=Limits(1, 64),
        engine=engine,
    )
    return replace(
        source,
        input_scales=scales if input_scales is None else input_scales,
        kv_scales=(caches if kv_scales is None else kv_scales) if recipe.kv_cache == "fp8" else {},
    )
