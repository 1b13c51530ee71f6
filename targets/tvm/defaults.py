"""What the target chooses where neither a recipe file nor the user does."""

from dataclasses import replace

from exporter.core.recipe import KIND_GROUPS, Precision, Recipe

DEFAULT_GROUP = 32


def completed(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
    """The recipe with a choice for each of `lm_head`, `embedding` and `kv_cache` that is in `unnamed`."""
    if {"lm_head", "embedding"} <= unnamed and recipe.lm_head.bits == 4:
        # Of all 4-bit matrices the head costs most divergence; 6 bits take nearly all of it away. One table serves
        # both where they are tied, so that the head's bits come out of those that the embedding had.
        six = _six_bits(recipe.lm_head)
        recipe = replace(recipe, lm_head=six, embedding=six.weight_only)
    return replace(recipe, kv_cache=_kv_cache(recipe)) if "kv_cache" in unnamed else recipe


def _six_bits(head: Precision) -> Precision:
    """int6 in the groups of a 4-bit precision, or in groups of 32 where those are none of int6."""
    group = head.group_size if head.group_size in KIND_GROUPS["int6"] else DEFAULT_GROUP
    return Precision("int6", group, activations=head.activations)


def _kv_cache(recipe: Recipe) -> str:
    """fp16 where some weights are rounded as coarsely or more, else fp32."""
    return "fp16" if any(part.is_coded or part.kind == "fp16" for part in recipe.precisions) else "fp32"
