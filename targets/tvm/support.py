"""What the target can do with a recipe: native, emulated or refused, from the configuration alone."""

from exporter.core.recipe import Precision, Recipe, all_precisions
from exporter.core.support import Support

KV_CACHES = ("fp32", "fp16", "int8", "fp8")


def precision_support(precision: Precision) -> Support:
    """One precision of weights, whatever the model."""
    if precision.kind in ("bf16", "fp16"):
        return Support("emulated", f"weights are stored and read as {precision.kind}, and computed with in fp32")
    return Support("native")


def kv_cache_support(kind: str) -> Support:
    """One storage of keys and values."""
    if kind == "fp8":
        return Support("refused", "the KV cache cannot be fp8 yet", "use --kv-cache fp16 or int8")
    return Support("native")


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model."""
    table = {precision.describe(): precision_support(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": kv_cache_support(kind) for kind in KV_CACHES}


def recipe_support(recipe: Recipe) -> Support:
    """A recipe for a model: the weakest of its parts, with every reason. Every Llama's shape is taken."""
    parts = [precision_support(precision) for precision in (recipe.linear, recipe.lm_head, recipe.embedding)]
    parts.append(kv_cache_support(recipe.kv_cache))
    for level in ("refused", "emulated"):
        found = list(dict.fromkeys(part for part in parts if part.level == level))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")
