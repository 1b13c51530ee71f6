"""Recipes written as TOML files (docs/recipes.md)."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from calibration.coverage import AUTO
from calibration.precision_text import GROUP_NAMES, default_group
from calibration.recipe_json import MAX_NAME
from calibration.recipe_rules import checked
from exporter.core.errors import InputError
from exporter.core.recipe import (
    CODED_FLOAT_BITS,
    INTEGER_BITS,
    KV_CACHES,
    SYMMETRIC_ONLY,
    AlgorithmOptions,
    Override,
    Precision,
    Recipe,
)

PARTS = ("linear", "lm_head", "embedding")
DEFAULT_BASE = "int4-rtn"
SECTION_KEYS = {"kind", "group_size", "symmetric", "activations"}
OPTION_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "smooth_alpha": ((int, float), "a number"),
    "awq_clip": ((bool,), "true or false"),
    "damping": ((int, float), "a number"),
    "act_order": ((bool,), "true or false"),
    "block": ((int,), "a whole number"),
    "observer": ((str,), "a string"),
    "percentile": ((int, float), "a number"),
}
assert set(OPTION_TYPES) == {field.name for field in fields(AlgorithmOptions)}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe from a file, the parts that the file names, and the options."""

    recipe: Recipe
    named: frozenset[str]
    named_options: frozenset[str]


def read_recipe_file(path: Path, preset: Callable[[str], Recipe]) -> RecipeFile:
    """The recipe of a TOML file; what it leaves out comes from its `base`, by `preset`. InputError names the entry."""
    table = _table(path)
    _known_keys(path, table, {"base", "name", "kv_cache", "algorithms", "options", "layers", *PARTS})
    base, name = _string(path, table, "base", DEFAULT_BASE), _string(path, table, "name", path.stem)
    _check_names(path, base, name)
    recipe = replace(preset(base), name=name)
    linear, lm_head, embedding = (
        _section_precision(path, part, _section(path, part, table.get(part, {})), getattr(recipe, part))
        for part in PARTS
    )
    recipe = replace(recipe, linear=linear, lm_head=lm_head, embedding=embedding)
    if "kv_cache" in table:
        recipe = replace(recipe, kv_cache=checked_kv_cache(_string(path, table, "kv_cache", "")))
    if "algorithms" in table:
        recipe = replace(recipe, algorithms=_algorithms(path, table["algorithms"]))
    options = _section(path, "options", table.get("options", {}))
    recipe = replace(recipe, options=_options(path, options, recipe.options))
    recipe = replace(recipe, overrides=(*recipe.overrides, *_overrides(path, table.get("layers", {}), recipe.linear)))
    return RecipeFile(checked(recipe, frozenset(options)), frozenset(table), frozenset(options))


def _check_names(path: Path, base: str, name: str) -> None:
    """`auto` is chosen by measurement, under a goal: no file stands for it, nor builds on it."""
    if base == AUTO:
        what = f"{path.name}: base is 'auto', which chooses every precision itself"
        raise InputError("recipe.file", what, "give --recipe auto, or another base")
    if name == AUTO or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise _bad_entry(path, "name", name[:80], "a printable text of its own, other than 'auto'")


def checked_kv_cache(kind: str) -> str:
    """A known kind of KV cache. Raises InputError."""
    if kind not in KV_CACHES:
        available = f"available: {', '.join(KV_CACHES)}"
        raise InputError("recipe.kv_cache", f"unknown KV cache precision {kind!r}", available)
    return kind


def _table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("recipe.file", f"cannot read {path}: {error.strerror}", "give an existing file") from error
    except ValueError as error:
        raise InputError("recipe.file", f"{path} is not TOML: {error}", "see docs/recipes.md") from error


def _overrides(path: Path, tables: object, linear: Precision) -> list[Override]:
    """[layers."PATTERN"] tables in the order of the file."""
    return [
        Override(pattern, _section_precision(path, where, _section(path, where, section), linear))
        for pattern, section in _section(path, "layers", tables).items()
        for where in [f'layers."{pattern}"']
    ]


def _section_precision(path: Path, part: str, section: dict[str, Any], base: Precision) -> Precision:
    """The base's precision with the entries of one table; a new kind keeps only what fits it."""
    where = f"[{part}] "
    _known_keys(path, section, SECTION_KEYS, where)
    kind = _string(path, section, "kind", base.kind, where)
    activations = _string(path, section, "activations", _kept_activations(base, kind), where)
    group = _group_size(path, where, section["group_size"]) if "group_size" in section else None
    symmetric = section.get("symmetric", base.symmetric or kind in SYMMETRIC_ONLY)
    if not isinstance(symmetric, bool):
        raise _bad_entry(path, f"{where}symmetric", symmetric, "true or false")
    if kind in INTEGER_BITS or kind in CODED_FLOAT_BITS:
        return Precision(kind, default_group(kind, base.group_size) if group is None else group, symmetric, activations)
    if "symmetric" in section:
        raise _bad_entry(path, f"{where}symmetric", symmetric, f"left out: {kind} has no codes")
    return Precision(kind, group, activations=activations)


def _kept_activations(base: Precision, kind: str) -> str:
    """Activations stay with a kind of the same family, and go with another one."""
    family = "int8" if kind in INTEGER_BITS else kind
    return base.activations if kind == base.kind or base.activations.partition("/")[0] == family else ""


def _group_size(path: Path, where: str, value: object) -> int:
    if isinstance(value, str) and value in GROUP_NAMES:
        return GROUP_NAMES[value]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad_entry(path, f"{where}group_size", value, 'a whole number, "channel" or "tensor"')
    return value


def _algorithms(path: Path, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _bad_entry(path, "algorithms", value, 'a list of names, as in ["smoothquant", "gptq"]')
    return tuple(value)


def _options(path: Path, section: dict[str, Any], base: AlgorithmOptions) -> AlgorithmOptions:
    _known_keys(path, section, set(OPTION_TYPES), "[options] ")
    for key, value in section.items():
        types, wanted = OPTION_TYPES[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _bad_entry(path, f"[options] {key}", value, wanted)
    return replace(base, **section)


def _section(path: Path, part: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad_entry(path, part, value, f"a table, as in [{part}]")
    return value


def _known_keys(path: Path, table: dict[str, Any], known: set[str], where: str = "") -> None:
    if unknown := sorted(table.keys() - known):
        raise InputError(
            "recipe.file", f"{path.name}: {where}has unknown entries {', '.join(unknown)}", f"known: {sorted(known)}"
        )


def _string(path: Path, table: dict[str, Any], key: str, default: str, where: str = "") -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise _bad_entry(path, f"{where}{key}", value, "a string")
    return value


def _bad_entry(path: Path, key: str, value: object, wanted: str) -> InputError:
    return InputError("recipe.file", f"{path.name}: {key} is {value!r}", f"it must be {wanted}; see docs/recipes.md")
