"""What the target chooses where neither a recipe file nor the user does."""

from dataclasses import replace

from exporter.core.config import ModelConfig
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.recipe import CHANNEL, Precision, Recipe
from targets.tensorrt_llm.formats import COMPRESSED, LEGACY, float_kind, form_of

GROUPS = (128, 64)
W4A8_GROUP = 128


def completed(
    recipe: Recipe, unnamed: frozenset[str], config: ModelConfig | None = None, engine: EngineOptions = PLAIN
) -> Recipe:
    """The recipe with a choice for each of `lm_head`, `embedding`, `kv_cache`, `linear` and `group_size` that is in
    `unnamed`.

    Head and embedding stay in the checkpoint's type, as every exporter leaves them; the cache is the server's, in the
    type it computes in.
    """
    form = form_of(engine)
    if "linear" in unnamed:
        recipe = replace(recipe, linear=_linear(recipe, form, "group_size" in unnamed))
    if "group_size" in unnamed:
        recipe = _regrouped(recipe, config, form)
    kind = float_kind(config, recipe)
    if "lm_head" in unnamed:
        recipe = replace(recipe, lm_head=Precision(kind))
    if "embedding" in unnamed:
        recipe = replace(recipe, embedding=Precision(kind))
    return replace(recipe, kv_cache=kind) if "kv_cache" in unnamed else recipe


def _linear(recipe: Recipe, form: str, free_group: bool) -> Precision:
    """The nearest that the form has to what the preset of a name means."""
    linear = recipe.linear
    if linear.kind == "nvfp4" and not linear.activations:
        # NVFP4 weights are multiplied by NVFP4 activations on the GPUs that have it.
        return replace(linear, activations="nvfp4/tensor")
    if recipe.name == "w4a8" and form != COMPRESSED:
        return Precision("int4", W4A8_GROUP if free_group else linear.group_size, activations="fp8/tensor")
    if recipe.name == "int8-weight" and form in (LEGACY, COMPRESSED) and free_group:
        return Precision("int8", CHANNEL)
    return linear


def _regrouped(recipe: Recipe, config: ModelConfig | None, form: str) -> Recipe:
    """int4 in groups of 128, or of 64 where those do not divide every width."""
    if recipe.linear.kind != "int4" or (recipe.linear.group_size or 0) <= 0:
        return recipe
    if recipe.linear.activations:
        return replace(recipe, linear=replace(recipe.linear, group_size=W4A8_GROUP))
    widths = {width for _, width in config.linear_shapes.values()} if config else set()
    groups = (*GROUPS, 32) if form == COMPRESSED else GROUPS
    fitting = (group for group in groups if all(width % group == 0 for width in widths))
    return replace(recipe, linear=replace(recipe.linear, group_size=next(fitting, GROUPS[0])))
