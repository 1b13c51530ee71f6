"""The recipes by name, and recipes written as TOML files (docs/recipes.md)."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import BITS, INTEGER_BITS, KV_CACHES, SYMMETRIC_ONLY, Precision, Recipe

DEFAULT_GROUP_SIZE = 32
PLANNED = (
    "int8-smoothquant",
    "int4-awq",
    "int4-gptq",
    "nf4",
    "w4a8",
    "fp8",
    "fp8-channel",
    "nvfp4",
    "mxfp4",
    "auto",
)
PLANNED_KV_CACHES = ("fp8",)
PARTS = ("linear", "lm_head", "embedding")


@dataclass(frozen=True)
class Preset:
    """A recipe that has a name, with one sentence for people."""

    recipe: Recipe
    summary: str


def _uniform(name: str, precision: Precision) -> Recipe:
    return Recipe(name, precision, precision, precision)


_FP32, _BF16, _FP16 = Precision("fp32"), Precision("bf16"), Precision("fp16")
_INT8 = Precision("int8", DEFAULT_GROUP_SIZE)
_INT4 = Precision("int4", DEFAULT_GROUP_SIZE)
_INT4_ASYMMETRIC = Precision("int4", DEFAULT_GROUP_SIZE, symmetric=False)

PRESETS: dict[str, Preset] = {
    preset.recipe.name: preset
    for preset in (
        Preset(_uniform("fp32", _FP32), "Every weight in float32: lossless."),
        Preset(_uniform("bf16", _BF16), "Weights in bfloat16: lossless for a bfloat16 checkpoint."),
        Preset(_uniform("fp16", _FP16), "Weights in float16."),
        Preset(_uniform("int8-weight", _INT8), "8-bit weights, a scale per 32."),
        Preset(
            Recipe("int4-rtn", _INT4, _INT4, _INT8),
            "4-bit weights rounded to nearest with error-minimising scales, a scale per 32; 8-bit embedding. "
            "Target tvm: head and embedding in 6 bits.",
        ),
        Preset(
            Recipe("int4-rtn-asym", _INT4_ASYMMETRIC, _INT4_ASYMMETRIC, _INT8),
            "The same with a zero point per group: smaller error, slower to build.",
        ),
    )
}


def preset(name: str) -> Recipe:
    """The recipe of a name. UnsupportedError for planned ones, InputError for unknown ones."""
    if name in PRESETS:
        return PRESETS[name].recipe
    available = f"available: {', '.join(PRESETS)}"
    if name in PLANNED:
        raise UnsupportedError("recipe.planned", f"recipe {name!r} is not available yet", available)
    raise InputError("recipe.unknown", f"recipe {name!r} is unknown", f"{available}; or the path of a TOML file")


def load_recipe(
    source: str | Path,
    *,
    group_size: int | None = None,
    lm_head: str | None = None,
    embedding: str | None = None,
    kv_cache: str | None = None,
    complete: Callable[[Recipe, frozenset[str]], Recipe] | None = None,
) -> Recipe:
    """A preset's name or a TOML file, with the command line's overrides applied in the order of the parameters.

    `lm_head` and `embedding` are PRECISION strings, see `parse_precision`. `complete`, a target's, chooses head,
    embedding and cache where neither a parameter nor the file names them.
    """
    path = Path(source)
    recipe, named = _read(path) if path.suffix == ".toml" else (preset(str(source)), frozenset[str]())
    if group_size is not None:
        recipe = _regroup(recipe, group_size)
    inherited = recipe.linear.group_size or group_size or DEFAULT_GROUP_SIZE
    if lm_head is not None:
        recipe = replace(recipe, lm_head=parse_precision(lm_head, inherited))
    if embedding is not None:
        recipe = replace(recipe, embedding=parse_precision(embedding, inherited))
    if kv_cache is not None:
        recipe = replace(recipe, kv_cache=checked_kv_cache(kv_cache))
    given = {"lm_head": lm_head, "embedding": embedding, "kv_cache": kv_cache}
    unnamed = frozenset(part for part, value in given.items() if value is None) - named
    return complete(recipe, unnamed) if complete else recipe


def parse_precision(text: str, group_size: int = DEFAULT_GROUP_SIZE) -> Precision:
    """`int4`, `int4/g128`, `int4/g32/asym`, `int8`, `bf16`, ...: the form `Precision.describe` writes.

    `group_size` holds where the text names none. Raises InputError.
    """
    kind, *options = text.split("/")
    symmetric, group = True, None
    for option in options:
        if option == "asym" and symmetric:
            symmetric = False
        elif option[:1] == "g" and option[1:].isdecimal() and group is None:
            group = int(option[1:])
        else:
            raise InputError("recipe.precision", f"precision {text!r}: {option!r} means nothing", _precision_forms())
    if kind not in BITS or (options and kind not in INTEGER_BITS):
        raise InputError("recipe.precision", f"unknown precision {text!r}", _precision_forms())
    if kind not in INTEGER_BITS:
        return Precision(kind)
    return Precision(kind, group_size if group is None else group, symmetric)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file; what it leaves out comes from its `base`. Raises InputError naming the entry."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Recipe, frozenset[str]]:
    """The recipe of a file, and the parts that the file names."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError("recipe.file", f"cannot read {path}: {error.strerror}", "give an existing file") from error
    except ValueError as error:
        raise InputError("recipe.file", f"{path} is not TOML: {error}", "see docs/recipes.md") from error
    _known_keys(path, table, {"base", "name", "kv_cache", *PARTS})
    base, name = _string(path, table, "base", "int4-rtn"), _string(path, table, "name", path.stem)
    recipe = replace(preset(base), name=name)
    for part in PARTS:
        section = table.get(part, {})
        if not isinstance(section, dict):
            raise _bad_entry(path, part, section, "a table, as in [linear]")
        changed = _section_precision(path, part, section, getattr(recipe, part))
        recipe = _with_part(recipe, part, changed)
    if "kv_cache" in table:
        recipe = replace(recipe, kv_cache=checked_kv_cache(_string(path, table, "kv_cache", "")))
    return recipe, frozenset(table)


def _section_precision(path: Path, part: str, section: dict[str, object], base: Precision) -> Precision:
    """The base's precision with the entries of one table; a new kind keeps only what fits it."""
    _known_keys(path, section, {"kind", "group_size", "symmetric"}, f"[{part}] ")
    kind = _string(path, section, "kind", base.kind)
    group = section.get("group_size")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int)):
        raise _bad_entry(path, f"[{part}] group_size", group, "a whole number")
    symmetric = section.get("symmetric", base.symmetric or kind in SYMMETRIC_ONLY)
    if not isinstance(symmetric, bool):
        raise _bad_entry(path, f"[{part}] symmetric", symmetric, "true or false")
    if kind in INTEGER_BITS:
        return Precision(kind, (base.group_size or DEFAULT_GROUP_SIZE) if group is None else group, symmetric)
    if "symmetric" in section:
        raise _bad_entry(path, f"[{part}] symmetric", symmetric, f"left out: {kind} has no codes")
    return Precision(kind, group)


def _with_part(recipe: Recipe, part: str, precision: Precision) -> Recipe:
    if part == "linear":
        return replace(recipe, linear=precision)
    return replace(recipe, lm_head=precision) if part == "lm_head" else replace(recipe, embedding=precision)


def _regroup(recipe: Recipe, group_size: int) -> Recipe:
    if not any(p.is_integer for p in (recipe.linear, recipe.lm_head, recipe.embedding)):
        raise InputError("recipe.group_size", f"recipe {recipe.name!r} has no groups", "leave --group-size out")
    return recipe.with_group_size(group_size)


def checked_kv_cache(kind: str) -> str:
    """A known kind of KV cache. UnsupportedError for planned ones, InputError for unknown ones."""
    available = f"available: {', '.join(KV_CACHES)}"
    if kind in PLANNED_KV_CACHES:
        raise UnsupportedError("recipe.kv_cache", f"a KV cache in {kind} is not available yet", available)
    if kind not in KV_CACHES:
        raise InputError("recipe.kv_cache", f"unknown KV cache precision {kind!r}", available)
    return kind


def _known_keys(path: Path, table: dict[str, object], known: set[str], where: str = "") -> None:
    if unknown := sorted(table.keys() - known):
        raise InputError(
            "recipe.file", f"{path.name}: {where}has unknown entries {', '.join(unknown)}", f"known: {sorted(known)}"
        )


def _string(path: Path, table: dict[str, object], key: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise _bad_entry(path, key, value, "a string")
    return value


def _bad_entry(path: Path, key: str, value: object, wanted: str) -> InputError:
    return InputError("recipe.file", f"{path.name}: {key} is {value!r}", f"it must be {wanted}; see docs/recipes.md")


def _precision_forms() -> str:
    return f"use one of {', '.join(BITS)}; integers also as int4/g128 or int4/g32/asym"
