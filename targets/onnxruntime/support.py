"""What the target can do with a recipe: native, emulated or refused, from the configuration alone."""

from calibration.coverage import kernel_group
from exporter.core.config import ModelConfig
from exporter.core.recipe import GROUP_SIZES, KV_CACHES, Precision, Recipe, all_precisions
from exporter.core.support import Support
from targets.gpu_activations import refused_on_cpus
from targets.onnxruntime.stored_rows import E2M1_KINDS

# GroupQueryAttention's rotary kernel: "head_size shall be a multiple of 16".
HEAD_DIM_MULTIPLE = 16


def precision_support(precision: Precision) -> Support:
    """One precision of weights and of their matrix's input, whatever the model."""
    kind = precision.kind
    if (refused := refused_on_cpus(precision)) is not None:
        return refused
    if kind in ("bf16", "fp16"):
        return Support("emulated", f"{kind} weights become fp32 when the engine is loaded")
    if kind == "int6":
        return Support("emulated", "int6 codes are stored in 8 bits: they save nothing over int8")
    if kind in E2M1_KINDS:
        return Support("emulated", f"{kind} values are stored as 8-bit integers, exactly; activations become int8")
    if kind == "fp8":
        return Support("emulated", "fp8 weights stay bytes and are decoded to fp32 for each product")
    return Support("native", _native(precision))


def _native(precision: Precision) -> str:
    """What is worth knowing of a precision that has a kernel."""
    if precision.kind == "nf4":
        return "MatMulBnb4 decodes the weights to fp32 for each product"
    if precision.activations:
        return f"activations become int8 in the blocks of MatMulNBits, at least as finely as {precision.activations}"
    return ""


def kv_cache_support(kind: str, head_dim: int = HEAD_DIM_MULTIPLE) -> Support:
    """One storage of keys and values, in heads of `head_dim`."""
    if kind == "fp32":
        return Support("native")
    if kind != "int8":
        why = f"GroupQueryAttention has no CPU kernel for a KV cache in {kind}"
        return Support("refused", why, "use --kv-cache int8 or --kv-cache fp32")
    if head_dim % HEAD_DIM_MULTIPLE:
        why = (
            f"heads of {head_dim} are no multiple of {HEAD_DIM_MULTIPLE}: standard attention stores no {kind} KV cache"
        )
        return Support("refused", why, "use --kv-cache fp32")
    return Support("native", "one scale for all keys and one for all values of a layer, from calibration")


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model."""
    table = {precision.describe(): precision_support(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": kv_cache_support(kind) for kind in KV_CACHES}


def recipe_support(config: ModelConfig, recipe: Recipe) -> Support:
    """A recipe for a model: the weakest of its parts, with every reason. Every Llama's shape is taken: heads that
    GroupQueryAttention cannot rotate (head_dim not a multiple of 16) run in standard attention operators."""
    parts = [*map(precision_support, recipe.precisions), kv_cache_support(recipe.kv_cache, config.head_dim)]
    parts += [_blocks_support(config, precision) for precision in recipe.precisions]
    for level in ("refused", "emulated", "native"):
        found = list(dict.fromkeys(part for part in parts if part.level == level and part.why))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")


def _blocks_support(config: ModelConfig, precision: Precision) -> Support:
    """Rows with one scale are cut into blocks that MatMulNBits has; a width may have none."""
    widths = {config.hidden_size, *(width for _, width in config.linear_shapes.values())}
    without = sorted(width for width in widths if precision.is_integer and precision.divides(width))
    if bad := [str(width) for width in without if not kernel_group(precision, width)]:
        why = f"no block of MatMulNBits ({', '.join(map(str, GROUP_SIZES))}) divides rows of {', '.join(bad)}"
        return Support("refused", why, "use target tvm, or a recipe with groups that divide the widths")
    return Support("native")
