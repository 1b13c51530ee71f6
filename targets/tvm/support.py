"""What the target can do with a recipe: native, emulated or refused, from the configuration alone."""

from exporter.core.config import ModelConfig
from exporter.core.recipe import GROUP_SIZES, KV_CACHES, Precision, Recipe, all_precisions
from exporter.core.support import Support
from targets.gpu_activations import refused_on_cpus
from targets.tvm.formats import multiplies_integers, stored_group


def precision_support(precision: Precision) -> Support:
    """One precision of weights and of their matrix's input, whatever the model."""
    kind = precision.kind
    if (refused := refused_on_cpus(precision)) is not None:
        return refused
    if kind in ("bf16", "fp16"):
        return Support("emulated", f"{kind} weights are stored and read as such, and computed with in fp32")
    if kind == "fp8":
        rounded = "; activations are rounded to E4M3 with a scale for each token" if precision.activations else ""
        return Support("emulated", f"fp8 weights are stored and read as such, and computed with in fp32{rounded}")
    return Support("native", _native(precision))


def _native(precision: Precision) -> str:
    """What is worth knowing of a precision that has kernels of its own."""
    if precision.activations == "int8/tensor":
        return "activations get a scale for each token, which is no coarser than the one from calibration"
    if precision.kind == "nf4":
        return "levels are multiplied as 16-bit integers; activations become int8"
    if precision.kind in ("nvfp4", "mxfp4"):
        return f"{precision.kind} values are multiplied as integers, exactly; activations become int8"
    return ""


def kv_cache_support(kind: str) -> Support:
    """One storage of keys and values."""
    if kind == "bf16":
        return Support("refused", "no kernel reads a KV cache in bf16; fp16 is as small", "use --kv-cache fp16 or fp32")
    if kind == "fp8":
        return Support("refused", "no kernel reads a KV cache in fp8; int8 is as small", "use --kv-cache int8")
    return Support("native")


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model."""
    table = {precision.describe(): precision_support(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": kv_cache_support(kind) for kind in KV_CACHES}


def recipe_support(config: ModelConfig, recipe: Recipe) -> Support:
    """A recipe for a model: the weakest of its parts, with every reason. Every Llama's shape is taken."""
    parts = [*map(precision_support, recipe.precisions), kv_cache_support(recipe.kv_cache)]
    parts += [_width_support(config, precision) for precision in recipe.precisions]
    for level in ("refused", "emulated", "native"):
        found = list(dict.fromkeys(part for part in parts if part.level == level and part.why))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")


def _width_support(config: ModelConfig, precision: Precision) -> Support:
    """Rows with one scale are cut into records of the kernels' groups; a width may have none."""
    widths = {config.hidden_size, *(width for _, width in config.linear_shapes.values())}
    without = sorted(width for width in widths if multiplies_integers(precision) and precision.divides(width))
    if bad := [str(width) for width in without if not stored_group(precision, width)]:
        why = f"no group of the kernels ({', '.join(map(str, GROUP_SIZES))}) divides rows of {', '.join(bad)}"
        return Support("refused", why, "use a recipe of fp32, bf16, fp16 or fp8")
    return Support("native")
