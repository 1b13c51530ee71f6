"""What the target can do with a recipe: native, emulated or refused, from the configuration alone."""

from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support

MATMUL_GROUP_SIZES = (16, 32, 64, 128, 256)
HEAD_DIM_MULTIPLE = 2


def precision_support(precision: Precision) -> Support:
    """One precision of weights, whatever the model."""
    if precision.kind in ("bf16", "fp16"):
        return Support("emulated", f"weights are stored as {precision.kind} and computed with in fp32")
    if precision.is_integer and precision.group_size not in MATMUL_GROUP_SIZES:
        return Support("refused", f"MatMulNBits has no group size {precision.group_size}", "use 16, 32, 64, 128 or 256")
    return Support("native")


def recipe_support(config: ModelConfig, recipe: Recipe) -> Support:
    """A recipe for a model: the weakest of its parts, with every reason."""
    if recipe.kv_cache != "fp32":
        return Support("refused", f"the KV cache cannot be {recipe.kv_cache} yet", "use --kv-cache fp32")
    parts = [precision_support(p) for p in (recipe.linear, recipe.lm_head, recipe.embedding)]
    for level in ("refused", "emulated"):
        found = list(dict.fromkeys(part for part in parts if part.level == level))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")
