"""What the target can do with a recipe: native, emulated or refused, from the configuration alone."""

from exporter.core.recipe import Precision, Recipe, all_precisions
from exporter.core.support import Support

MATMUL_GROUP_SIZES = (16, 32, 64, 128, 256)
KV_CACHES = ("fp32", "fp16", "int8", "fp8")


def precision_support(precision: Precision) -> Support:
    """One precision of weights, whatever the model."""
    if precision.kind in ("bf16", "fp16"):
        return Support("emulated", f"weights are stored as {precision.kind} and computed with in fp32")
    if precision.is_integer and precision.group_size not in MATMUL_GROUP_SIZES:
        return Support("refused", f"MatMulNBits has no group size {precision.group_size}", "use 16, 32, 64, 128 or 256")
    if precision.kind == "int6":
        return Support("emulated", "int6 codes are stored in 8 bits: they save nothing over int8")
    return Support("native")


def kv_cache_support(kind: str) -> Support:
    """One storage of keys and values."""
    if kind == "fp32":
        return Support("native")
    return Support("refused", f"the KV cache cannot be {kind} yet", "use --kv-cache fp32")


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model."""
    table = {precision.describe(): precision_support(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": kv_cache_support(kind) for kind in KV_CACHES}


def recipe_support(recipe: Recipe) -> Support:
    """A recipe for a model: the weakest of its parts, with every reason. Every Llama's shape is taken: heads that
    GroupQueryAttention cannot rotate (head_dim not a multiple of 16) run in standard attention operators."""
    parts = [precision_support(precision) for precision in (recipe.linear, recipe.lm_head, recipe.embedding)]
    parts.append(kv_cache_support(recipe.kv_cache))
    for level in ("refused", "emulated"):
        found = list(dict.fromkeys(part for part in parts if part.level == level))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")
