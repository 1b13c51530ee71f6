"""What the target chooses where neither a recipe file nor the user does."""

from dataclasses import replace

from exporter.core.recipe import Override, Precision, Recipe


def completed(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
    """The recipe with all its halves of one kind where they are in `unnamed`: head, embedding, KV cache, and, where
    the linear layers are a preset's, those that it leaves in 16 bits.

    That kind is bf16 where linear layers or a part that was named are in bf16, else fp16, which is 8 times as fine.
    Tables of embeddings cannot be coded here, and a head is one matrix among hundreds.
    """
    half = Precision("bf16" if _named_in_bf16(recipe, unnamed) else "fp16")
    if "lm_head" in unnamed:
        recipe = replace(recipe, lm_head=half)
    if "embedding" in unnamed:
        recipe = replace(recipe, embedding=half)
    if "linear" in unnamed:
        recipe = replace(recipe, overrides=tuple(_in_half(override, half) for override in recipe.overrides))
    return replace(recipe, kv_cache=half.kind) if "kv_cache" in unnamed else recipe


def _named_in_bf16(recipe: Recipe, unnamed: frozenset[str]) -> bool:
    kinds = [recipe.linear.kind]
    kinds += [getattr(recipe, part).kind for part in ("lm_head", "embedding") if part not in unnamed]
    kinds += [override.precision.kind for override in recipe.overrides if "linear" not in unnamed]
    kinds += [recipe.kv_cache] if "kv_cache" not in unnamed else []
    return "bf16" in kinds


def _in_half(override: Override, half: Precision) -> Override:
    return replace(override, precision=half) if override.precision.kind in ("fp16", "bf16") else override
