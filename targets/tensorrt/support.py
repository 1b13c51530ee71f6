"""What the target can do with a recipe: native, emulated or refused, from the configuration and the SM alone.

What TensorRT-RTX 1.7.1's builder accepts was found by building (tests/targets/tensorrt/test_builds.py), what it makes
of it by its list of an engine's layers (docs/tensorrt-graph.md). Which SM has which arithmetic is also in NVIDIA's
support matrix of TensorRT, "Hardware and Precision".
"""

from calibration.coverage import actual_precision
from exporter.core.config import ModelConfig
from exporter.core.recipe import KV_CACHES, Precision, Recipe, all_precisions
from exporter.core.support import Support
from exporter.core.task import GENERATE, Task
from targets.tensorrt.formats import arithmetic, form_of, rounds_inputs, stored_group

Capability = tuple[int, int]
ROUNDED = "8-bit inputs"
LEAST_SM: dict[str, Capability] = {"bf16": (8, 0), "int4": (8, 0), ROUNDED: (8, 0), "fp8": (8, 9), "nvfp4": (10, 0)}
"""The first SM that computes with a kind of weight, or multiplies rounded inputs into float32."""
HEAD_DIM_MULTIPLE, LEAST_HEAD_DIM, LARGEST_HEAD_DIM = 8, 16, 256
LEAST_HEADS = {"generate": 4, "classify": 2}
"""Query heads that attention's kernels take; a decode step wants more of them."""
WORKING = "use --recipe fp8, fp16, int4-awq or int8-smoothquant"


def precision_support(precision: Precision) -> Support:
    """One precision of weights and of their matrix's input, whatever the model."""
    kind = precision.kind
    if kind == "fp32":
        return Support(
            "refused", "attention computes in fp16 or bf16, and products in TF32", "use --recipe fp16 or bf16"
        )
    if not precision.symmetric:
        return Support("refused", "TensorRT has no zero points", "use a symmetric recipe, such as int4-rtn or int4-awq")
    if kind in ("nf4", "mxfp4"):
        return Support("refused", f"TensorRT-RTX has no kernel for {kind} weights", WORKING)
    return _emulation(precision) or Support("native")


def _emulation(precision: Precision) -> Support | None:
    form = form_of(precision)
    if form == "blocks":
        stored = "int6 codes take 8 bits; " if precision.kind == "int6" else ""
        unrounded = "; activations stay in half precision" if precision.activations else ""
        why = f"{stored}blocks of 8-bit weights are decoded by a kernel of their own in every step{unrounded}"
        return Support("emulated", why)
    if form == "nvfp4" and not precision.activations:
        return Support(
            "emulated", "nvfp4 weights are decoded by a kernel of their own unless activations are nvfp4 too"
        )
    if precision.activations and not rounds_inputs(precision):
        asked = precision.activations
        return Support("emulated", f"no product of int4 codes takes {asked} activations: they stay in half precision")
    return None


def embedding_support(precision: Precision) -> Support:
    """A table of embeddings."""
    if precision.is_coded:
        what = f"a table of embeddings in {precision.kind} would be decoded as a whole for every step"
        return Support("refused", what, "use --embedding fp16")
    return Support("native")


def kv_cache_support(kind: str, half: str = "") -> Support:
    """One storage of keys and values, in an engine that computes in `half` (either, if empty)."""
    if kind not in ("fp16", "bf16"):
        what = f"TensorRT's attention reads no KV cache in {kind}"
        return Support("refused", what, f"use --kv-cache {half or 'fp16'}")
    if half and kind != half:
        return Support("refused", f"the KV cache has the type of attention, {half}", f"use --kv-cache {half}")
    return Support("native")


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model and the GPU."""
    table = {precision.describe(): precision_support(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": kv_cache_support(kind) for kind in KV_CACHES}


def recipe_support(
    config: ModelConfig, recipe: Recipe, capability: Capability | None = None, task: Task = GENERATE
) -> Support:
    """A recipe for a model on an SM (`capability`, (8, 9); None: any): the weakest of its parts, with every reason."""
    half = arithmetic(recipe)
    parts = [*map(precision_support, recipe.precisions), embedding_support(recipe.embedding)]
    parts += [kv_cache_support(recipe.kv_cache, half)] if not task.classifies else []
    parts += [_shape_support(config, task), *(_width_support(config, precision) for precision in recipe.precisions)]
    parts += [_sm_support(kind, capability) for kind in sorted(_kinds(recipe))] if capability else []
    for level in ("refused", "emulated", "native"):
        found = list(dict.fromkeys(part for part in parts if part.level == level and part.why))
        if found:
            return Support(level, "; ".join(part.why for part in found), found[0].remedy)
    return Support("native")


def _kinds(recipe: Recipe) -> set[str]:
    rounded = {ROUNDED for precision in recipe.precisions if rounds_inputs(precision)}
    return {precision.kind for precision in recipe.precisions} | rounded


def _sm_support(kind: str, capability: Capability) -> Support:
    least = LEAST_SM.get(kind, (0, 0))
    if capability >= least:
        return Support("native")
    name, first = (f"SM{major}{minor}" for major, minor in (capability, least))
    return Support("refused", f"{name} cannot compute with {kind}, {first} and later do", _sm_remedy(capability))


def _sm_remedy(capability: Capability) -> str:
    """Recipes that the SM can do."""
    if capability >= LEAST_SM["fp8"]:
        return "use --recipe fp8, int8-smoothquant or int4-awq"
    return "use --recipe int8-smoothquant or int4-awq" if capability >= LEAST_SM["int4"] else "use --recipe fp16"


def _shape_support(config: ModelConfig, task: Task) -> Support:
    """Heads that attention's kernels take."""
    size, least = config.head_dim, LEAST_HEADS[task.kind]
    wrong = size % HEAD_DIM_MULTIPLE or not LEAST_HEAD_DIM <= size <= LARGEST_HEAD_DIM
    if wrong:
        sizes = f"multiples of {HEAD_DIM_MULTIPLE} from {LEAST_HEAD_DIM} to {LARGEST_HEAD_DIM}"
        why = f"heads of {size}: TensorRT's attention takes {sizes}"
        return Support("refused", why, "use target tvm or onnxruntime")
    if config.num_heads < least:
        why = f"{config.num_heads} attention heads: TensorRT's kernels take {least} or more"
        return Support("refused", why, "use target tvm or onnxruntime")
    return Support("native")


def _width_support(config: ModelConfig, precision: Precision) -> Support:
    """Rows of int4 with one scale are cut into blocks; a width may have none."""
    widths = {config.hidden_size, *(width for _, width in config.linear_shapes.values())}
    coded = [width for width in sorted(widths) if actual_precision(precision, width) == precision]
    if form_of(precision) == "int4" and (bad := [str(w) for w in coded if not stored_group(precision, w)]):
        why = f"no block of TensorRT's int4 kernels divides rows of {', '.join(bad)}"
        return Support("refused", why, "use a recipe with groups that divide the widths, or fp8")
    return Support("native")
