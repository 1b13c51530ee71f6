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


ADDED_IN_3: dict[str, Any] = {"task": {"kind": "generate", "labels": [], "token_ids": []}, "engine": {}}


def upgrade(value: dict[str, Any], version: int) -> dict[str, Any]:
    """Version 1 knew neither calibration nor what a recipe says of it, version 2 no task and no facts of an engine."""
    if version < 2:
        value = _calibrated(value)
    return value if version >= 3 else {**value, **ADDED_IN_3, "schema_version": 3}


def _calibrated(value: dict[str, Any]) -> dict[str, Any]:
    recipe = Fields(value, "manifest.json").mapping("recipe")
    parts = {part: {**Fields(recipe, "recipe").mapping(part), "activations": ""} for part in PARTS}
    return {**value, "recipe": {**recipe, **parts, **ADDED_IN_2}, "calibration": None}
