"""The recipe of a build: a preset, a TOML file, or that of a file of quantization parameters, and its overrides."""

from calibration.presets import PRESETS, completed, load_recipe, with_parts
from calibration.qparams import QParams
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.recipe import Recipe
from exporter.options import BuildOptions
from targets.base import Target

DEFAULT = "fp32"
PARTS = ("lm_head", "embedding", "kv_cache")


def requested_recipe(
    options: BuildOptions, target: Target, config: ModelConfig, parameters: QParams | None = None
) -> Recipe:
    """The recipe with the options' overrides applied, and the target's choice of what nobody named."""
    if parameters is not None:
        return _of_parameters(options, target, config, parameters.recipe)
    return load_recipe(
        options.recipe or DEFAULT,
        group_size=options.group_size,
        lm_head=options.lm_head,
        embedding=options.embedding,
        kv_cache=options.kv_cache,
        rotate=options.calibration.rotate,
        complete=lambda recipe, unnamed: target.complete(recipe, unnamed, config, options.engine),
    )


def _of_parameters(options: BuildOptions, target: Target, config: ModelConfig, recipe: Recipe) -> Recipe:
    if options.recipe is not None and (asked := load_recipe(options.recipe).name) != recipe.name:
        what = f"--recipe {asked} with the quantization parameters of recipe {recipe.name}"
        raise InputError("qparams.recipe", what, "leave --recipe out, or calibrate with that recipe")
    if options.group_size is not None:
        recipe = recipe.with_group_size(options.group_size)
    recipe = with_parts(recipe, options.group_size, options.lm_head, options.embedding, options.kv_cache)
    return completed(
        recipe, _unnamed(options, recipe), lambda part, unnamed: target.complete(part, unnamed, config, options.engine)
    )


def _unnamed(options: BuildOptions, recipe: Recipe) -> frozenset[str]:
    """What neither the options name nor whoever calibrated: what is still as the preset has it."""
    listed = PRESETS.get(recipe.name)
    open_parts = {part for part in PARTS if getattr(options, part) is None}
    if listed is None:
        return frozenset(open_parts & ({"kv_cache"} if recipe.kv_cache == "fp32" else set()))
    return frozenset(part for part in open_parts if getattr(recipe, part) == getattr(listed.recipe, part))
