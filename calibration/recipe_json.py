"""Recipes and precisions as JSON, and back: every field is written, nothing unknown or missing is read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from exporter.core.errors import InputError
from exporter.core.recipe import ALGORITHMS, KV_CACHES, AlgorithmOptions, Override, Precision, Recipe
from exporter.core.strict_json import shorten

MAX_NAME, MAX_OVERRIDES = 4096, 4096


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """All fields of a recipe by name; precisions, options and overrides are objects of theirs."""
    value = asdict(recipe)
    return {**value, "algorithms": list(recipe.algorithms), "overrides": list(value["overrides"])}


def precision_to_json(precision: Precision) -> dict[str, Any]:
    """kind, group_size (a number, -1 for a row, 0 for the matrix, null), symmetric, activations."""
    return asdict(precision)


def recipe_from_json(value: object) -> Recipe:
    """The recipe that `recipe_to_json` wrote. InputError (`recipe.json`, or what the recipe itself refuses)."""
    found = _object(value, Recipe, "recipe")
    parts = {part: precision_from_json(found[part], part) for part in ("linear", "lm_head", "embedding")}
    return Recipe(
        name=_text(found["name"], "name"),
        **parts,
        kv_cache=_one_of(found["kv_cache"], "kv_cache", KV_CACHES),
        algorithms=_algorithms(found["algorithms"]),
        options=_options(found["options"]),
        overrides=tuple(_override(entry) for entry in _list(found["overrides"], "overrides", MAX_OVERRIDES)),
    )


def precision_from_json(value: object, what: str = "precision") -> Precision:
    """The precision that `precision_to_json` wrote; a Precision refuses on its own what does not fit together."""
    found = _object(value, Precision, what)
    group = found["group_size"]
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or abs(group) >= 1 << 31):
        raise _bad(f"group_size of {what} is {shorten(group)}")
    symmetric = _boolean(found["symmetric"], f"symmetric of {what}")
    kind, activations = (_text(found[name], f"{name} of {what}", empty=True) for name in ("kind", "activations"))
    return Precision(kind, group, symmetric, activations)


def _override(value: object) -> Override:
    found = _object(value, Override, "override")
    return Override(_text(found["pattern"], "pattern"), precision_from_json(found["precision"], "override"))


def _algorithms(value: object) -> tuple[str, ...]:
    names = tuple(_one_of(name, "algorithms", ALGORITHMS) for name in _list(value, "algorithms", len(ALGORITHMS)))
    if len(set(names)) != len(names):
        raise _bad(f"algorithms names one twice: {', '.join(names)}")
    return names


def _options(value: object) -> AlgorithmOptions:
    found = _object(value, AlgorithmOptions, "options")
    return AlgorithmOptions(**{name: OPTIONS[name](entry, f"options.{name}") for name, entry in found.items()})


def _object(value: object, kind: type, what: str) -> dict[str, Any]:
    """An object with exactly the fields of a dataclass."""
    if not isinstance(value, dict):
        raise _bad(f"{what} is {shorten(value)}, not an object")
    expected = {field.name for field in fields(kind)}
    if unknown := sorted(value.keys() - expected):
        raise _bad(f"{what} has the unknown key {shorten(unknown[0])}")
    if missing := sorted(expected - value.keys()):
        raise _bad(f"{what} lacks {', '.join(missing)}")
    return value


def _list(value: object, what: str, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _bad(f"{what} is {shorten(value)}, not a list of at most {most}")
    return value


def _text(value: object, what: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty) or len(value) > MAX_NAME:
        raise _bad(f"{what} is {shorten(value)}, not a short text")
    return value


def _one_of(value: object, what: str, names: tuple[str, ...]) -> str:
    if value not in names:
        raise _bad(f"{what} has {shorten(value)}, not one of {', '.join(names)}")
    return str(value)


def _boolean(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"{what} is {shorten(value)}, not true or false")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _bad(f"{what} is {shorten(value)}, not a number from 0 on")
    return float(value)


def _optional_number(value: object, what: str) -> float | None:
    return None if value is None else _number(value, what)


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise _bad(f"{what} is {shorten(value)}, not a whole number from 1 on")
    return value


def _bad(what: str) -> InputError:
    return InputError("recipe.json", f"the recipe is not one: {what}", "write the file again")


OPTIONS: Mapping[str, Callable[[object, str], Any]] = {
    "smooth_alpha": _optional_number,
    "awq_clip": _boolean,
    "damping": _number,
    "act_order": _boolean,
    "block": _count,
    "observer": _text,
    "percentile": _number,
}
