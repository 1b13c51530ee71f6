"""What the target chooses where neither a recipe file nor the user does."""

from dataclasses import replace

from exporter.core.recipe import Precision, Recipe

PARTS = ("linear", "lm_head", "embedding")


def completed(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
    """The recipe with head, embedding and KV cache in the type of its arithmetic where they are in `unnamed`.

    That type is bf16 where linear layers or a part that was named are in bf16, else fp16. Tables of embeddings cannot
    be coded here, and coded heads are worth it only in memory: a step reads them once, like every layer's matrices.
    """
    half = Precision("bf16" if _named_in_bf16(recipe, unnamed) else "fp16")
    if "lm_head" in unnamed:
        recipe = replace(recipe, lm_head=half)
    if "embedding" in unnamed:
        recipe = replace(recipe, embedding=half)
    return replace(recipe, kv_cache=half.kind) if "kv_cache" in unnamed else recipe


def _named_in_bf16(recipe: Recipe, unnamed: frozenset[str]) -> bool:
    parts = [getattr(recipe, part) for part in PARTS if part == "linear" or part not in unnamed]
    parts += [override.precision for override in recipe.overrides]
    return recipe.kv_cache == "bf16" or any(part.kind == "bf16" for part in parts)
