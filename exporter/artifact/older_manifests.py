"""Manifests of earlier schema versions as the present one would have written them."""

from typing import Any

from exporter.artifact.json_fields import Fields

PARTS = ("linear", "lm_head", "embedding")
ADDED_IN_2: dict[str, Any] = {
    "algorithms": [],
    "options": {
        "smooth_alpha": None,
        "awq_clip": True,
        "damping": 0.01,
        "act_order": True,
        "block": 128,
        "observer": "absmax",
        "percentile": 99.99,
    },
    "overrides": [],
}


def upgrade(value: dict[str, Any], version: int) -> dict[str, Any]:
    """Version 1 knew neither calibration nor what a recipe says of it."""
    if version >= 2:
        return value
    recipe = Fields(value, "manifest.json").mapping("recipe")
    parts = {part: {**Fields(recipe, "recipe").mapping(part), "activations": ""} for part in PARTS}
    return {**value, "schema_version": 2, "recipe": {**recipe, **parts, **ADDED_IN_2}, "calibration": None}
