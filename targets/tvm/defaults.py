"""What the target chooses where neither a recipe file nor the user does."""

from dataclasses import replace

from exporter.core.recipe import INTEGER_BITS, Precision, Recipe


def completed(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
    """The recipe with a choice for each of `lm_head`, `embedding` and `kv_cache` that is in `unnamed`."""
    if {"lm_head", "embedding"} <= unnamed and recipe.lm_head.kind == "int4":
        # Of all 4-bit matrices the head costs most divergence; 6 bits take nearly all of it away. One table serves
        # both where they are tied, so that the head's bits come out of those that the embedding had.
        six = Precision("int6", recipe.lm_head.group_size)
        recipe = replace(recipe, lm_head=six, embedding=six)
    return replace(recipe, kv_cache=_kv_cache(recipe)) if "kv_cache" in unnamed else recipe


def _kv_cache(recipe: Recipe) -> str:
    """fp16 where some weights are rounded as coarsely or more, else fp32."""
    kinds = {precision.kind for precision in (recipe.linear, recipe.lm_head, recipe.embedding)}
    return "fp16" if kinds & {"fp16", *INTEGER_BITS} else "fp32"
