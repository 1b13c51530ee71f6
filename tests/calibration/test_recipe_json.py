"""Recipes written as JSON and read again: equal, and strict about every key and value."""

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from calibration.presets import PRESETS
from calibration.recipe_json import (
    OPTIONS,
    precision_from_json,
    precision_to_json,
    recipe_from_json,
    recipe_to_json,
)
from exporter.core.errors import InputError
from exporter.core.recipe import AlgorithmOptions, Override, Precision, Recipe, all_precisions

FULL = Recipe(
    "everything",
    Precision("int4", 32, False, "int8/token"),
    Precision("fp8", 0, activations="fp8/tensor"),
    Precision("bf16"),
    "fp8",
    ("rotate", "awq", "gptq"),
    AlgorithmOptions(0.25, False, 0.02, False, 64, "percentile", 99.9),
    (Override("layers.0.*", Precision("int8", -1)), Override("*.down_proj", Precision("nvfp4", 16))),
)


def through_text(value: object) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize("recipe", [*(preset.recipe for preset in PRESETS.values()), FULL], ids=lambda r: r.name)
def test_recipes_come_back(recipe: Recipe) -> None:
    assert recipe_from_json(through_text(recipe_to_json(recipe))) == recipe


@pytest.mark.parametrize("precision", all_precisions(), ids=Precision.describe)
def test_precisions_come_back(precision: Precision) -> None:
    assert precision_from_json(through_text(precision_to_json(precision))) == precision


def test_every_option_has_a_reader() -> None:
    assert set(OPTIONS) == {field.name for field in fields(AlgorithmOptions)}


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def apply(recipe: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            recipe = recipe[int(parent)] if isinstance(recipe, list) else recipe[parent]
        if value is ...:
            del recipe[last]
        else:
            recipe[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "kind"),
    [
        ("name", ..., "recipe.json"),
        ("name", "", "recipe.json"),
        ("name", 3, "recipe.json"),
        ("extra", 1, "recipe.json"),
        ("kv_cache", "int4", "recipe.json"),
        ("kv_cache", ["int8"], "recipe.json"),
        ("linear", None, "recipe.json"),
        ("linear.kind", "int5", "recipe.precision"),
        ("linear.kind", 4, "recipe.json"),
        ("linear.group_size", 33, "recipe.group_size"),
        ("linear.group_size", True, "recipe.json"),
        ("linear.group_size", 32.0, "recipe.json"),
        ("linear.symmetric", 1, "recipe.json"),
        ("linear.activations", "fp8/token", "recipe.activations"),
        ("linear.activations", ..., "recipe.json"),
        ("lm_head.scale", 1, "recipe.json"),
        ("algorithms", "gptq", "recipe.json"),
        ("algorithms", ["gptq", "gptq"], "recipe.json"),
        ("algorithms", ["magic"], "recipe.json"),
        ("options.damping", "0.01", "recipe.json"),
        ("options.damping", -0.1, "recipe.json"),
        ("options.damping", float("inf"), "recipe.json"),
        ("options.block", 0, "recipe.json"),
        ("options.block", 12.5, "recipe.json"),
        ("options.act_order", None, "recipe.json"),
        ("options.percentile", ..., "recipe.json"),
        ("overrides", {}, "recipe.json"),
        ("overrides.0.pattern", None, "recipe.json"),
        ("overrides.0.precision.kind", "int3", "recipe.precision"),
    ],
)
def test_what_is_no_recipe_is_refused(path: str, value: object, kind: str) -> None:
    written = copy.deepcopy(through_text(recipe_to_json(FULL)))
    change(path, value)(written)
    with pytest.raises(InputError) as found:
        recipe_from_json(written)
    assert found.value.kind == kind


@pytest.mark.parametrize("value", [None, [], "int4-rtn", 3])
def test_other_values_are_no_recipe(value: object) -> None:
    with pytest.raises(InputError):
        recipe_from_json(value)
