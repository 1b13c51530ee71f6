"""What of a recipe fits together, from the recipe alone: algorithms, their options, activations, rotation."""

from collections.abc import Callable
from dataclasses import replace

from exporter.core.errors import InputError
from exporter.core.recipe import ALGORITHMS, INTEGER_BITS, Precision, Recipe

OBSERVERS = ("absmax", "percentile", "mse", "entropy")
FITS: dict[str, tuple[Callable[[Precision], bool], str]] = {
    "rotate": (lambda p: p.is_integer, f"layers in {', '.join(INTEGER_BITS)}"),
    "smoothquant": (lambda p: p.activations.startswith("int8"), "layers with int8/token or int8/tensor activations"),
    "awq": (lambda p: p.is_coded and p.kind != "fp8", "layers in integers, nf4, nvfp4 or mxfp4"),
    "gptq": (lambda p: p.is_coded, "layers in integers, fp8, nf4, nvfp4 or mxfp4"),
}
"""What each algorithm works on, in code and in words."""
OPTION_OF = {
    "smooth_alpha": "smoothquant",
    "awq_clip": "awq",
    "damping": "gptq",
    "act_order": "gptq",
    "block": "gptq",
}
"""The algorithm that an option belongs to; the others belong to scales from calibration."""


def checked(recipe: Recipe, named_options: frozenset[str] = frozenset()) -> Recipe:
    """The recipe with its algorithms in the order they run. InputError (`recipe.algorithms`, `recipe.options`,
    `recipe.activations`) for what contradicts itself; `named_options` are those that somebody asked for."""
    if recipe.embedding.activations:
        what = f"{recipe.embedding.activations} activations for the embedding, which multiplies nothing"
        raise InputError("recipe.activations", what, "leave activations out of [embedding]")
    _check_algorithms(recipe)
    _check_options(recipe, named_options)
    return replace(recipe, algorithms=tuple(name for name in ALGORITHMS if name in recipe.algorithms))


def rotated(recipe: Recipe) -> Recipe:
    """The recipe with a rotation before all else. InputError where its layers are no integers."""
    return checked(replace(recipe, algorithms=("rotate", *(name for name in recipe.algorithms if name != "rotate"))))


def layer_precisions(recipe: Recipe) -> tuple[Precision, ...]:
    """What matrices of decoder layers may have."""
    return (recipe.linear, *(override.precision for override in recipe.overrides))


def _check_algorithms(recipe: Recipe) -> None:
    names = recipe.algorithms
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise InputError(
            "recipe.algorithms", f"unknown algorithms {', '.join(unknown)}", f"use some of {', '.join(ALGORITHMS)}"
        )
    if len(set(names)) < len(names):
        raise InputError("recipe.algorithms", f"algorithms named twice: {', '.join(names)}", "name each once")
    for name in names:
        fits, wanted = FITS[name]
        if not any(fits(precision) for precision in layer_precisions(recipe)):
            found = ", ".join(dict.fromkeys(precision.describe() for precision in layer_precisions(recipe)))
            raise InputError(
                "recipe.algorithms",
                f"recipe {recipe.name!r} runs {name} on layers in {found}",
                f"{name} is for {wanted}: leave it out of `algorithms`, or change [linear]",
            )


def _check_options(recipe: Recipe, named: frozenset[str]) -> None:
    for option in sorted(named):
        owner = OPTION_OF.get(option)
        if owner and owner not in recipe.algorithms:
            raise _bad_option(option, f"belongs to {owner}, which the recipe does not run")
    options = recipe.options
    if "observer" in named and options.observer != "absmax" and not _static(recipe):
        raise _bad_option("observer", "clips scales from calibration, and the recipe has none")
    if "percentile" in named and options.observer != "percentile":
        raise _bad_option("percentile", f"belongs to observer 'percentile', not to {options.observer!r}")
    if options.smooth_alpha is not None and not 0 <= options.smooth_alpha <= 1:
        raise _bad_option("smooth_alpha", f"is {options.smooth_alpha}: it must be from 0 to 1")
    if not 0 < options.damping <= 1:
        raise _bad_option("damping", f"is {options.damping}: it must be above 0, at most 1")
    if not 1 <= options.block < 1 << 31:
        raise _bad_option("block", f"is {options.block}: it must be at least 1, below 2^31")
    if options.observer not in OBSERVERS:
        raise _bad_option("observer", f"is {options.observer!r}: it must be one of {', '.join(OBSERVERS)}")
    if not 50 < options.percentile <= 100:
        raise _bad_option("percentile", f"is {options.percentile}: it must be above 50, at most 100")


def _static(recipe: Recipe) -> bool:
    """Whether it has scales of activations or of the cache from calibration."""
    static = any(precision.activations.endswith("/tensor") for precision in recipe.precisions)
    return static or recipe.kv_cache in ("int8", "fp8")


def _bad_option(option: str, what: str) -> InputError:
    return InputError("recipe.options", f"option {option} {what}", "change or remove it; docs/recipes.md lists options")
