"""What each form of checkpoint can hold of a recipe, from the configuration alone."""

from collections.abc import Callable, Iterator

from calibration.coverage import AUTO
from exporter.core.config import ModelConfig
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.recipe import KV_CACHES, Precision, Recipe, all_precisions
from exporter.core.support import Support
from targets.tensorrt_llm import shards
from targets.tensorrt_llm.formats import (
    AWQ_GROUPS,
    COMPRESSED,
    FLOAT_TYPES,
    FORMS,
    HF,
    LEGACY,
    W4A8_GROUPS,
    WNA16_GROUPS,
    compressed_format,
    float_kind,
    form_of,
    hf_algorithm,
    legacy_algorithm,
)

NAMES: dict[str, Callable[[Precision], str | None]] = {
    HF: hf_algorithm,
    LEGACY: legacy_algorithm,
    COMPRESSED: compressed_format,
}
TITLES = {
    HF: "the quantized Hugging Face checkpoint (ModelOpt)",
    LEGACY: "the TensorRT-LLM checkpoint",
    COMPRESSED: "the compressed-tensors checkpoint",
}
RECIPES = {
    HF: "fp8, fp8-channel, int4-awq (groups of 128 or 64), w4a8, nvfp4, bf16 or fp16",
    LEGACY: "fp8, fp8-channel, int8-smoothquant, int4-awq (groups of 128 or 64), w4a8, bf16 or fp16",
    COMPRESSED: "fp8, fp8-channel, int8-smoothquant, int4-gptq or int4-awq, nvfp4, bf16 or fp16",
}
CACHES = {HF: ("fp8",), LEGACY: ("fp8", "int8"), COMPRESSED: ("fp8",)}
"""Caches with scales of their own in the files; others are in the type that the server computes in."""


def precision_support(precision: Precision, form: str = HF) -> Support:
    """One precision of the layers' matrices, whatever the model."""
    if precision.kind in FLOAT_TYPES:
        return Support("native")
    name = NAMES[form](precision)
    if name is None:
        return Support("refused", _why(precision, form), _remedy(precision, form))
    return Support("native", name)


def _why(precision: Precision, form: str) -> str:
    title = TITLES[form]
    if precision.kind == "fp32":
        return "servers compute in 16 bits: no checkpoint in fp32 is written"
    if not precision.symmetric:
        return f"{title} has no zero points: {precision.describe()}"
    if precision.kind in ("nf4", "mxfp4", "int6"):
        return f"{title} has no {precision.kind}"
    if precision.kind == "int8" and precision.activations and form == HF:
        return "no server takes INT8 weights and activations (SmoothQuant) from a ModelOpt checkpoint"
    groups = {HF: AWQ_GROUPS, LEGACY: AWQ_GROUPS, COMPRESSED: WNA16_GROUPS}[form]
    if precision.activations == "fp8/tensor" and precision.kind == "int4":
        groups = W4A8_GROUPS
    if precision.kind == "int4" and precision.group_size not in groups and form_takes_int4(precision, form):
        wanted = " or ".join(str(group) if group > 0 else "a row" for group in groups)
        return f"{precision.describe()}: the kernels have groups of {wanted}"
    return f"{title} has no {precision.describe()}"


def form_takes_int4(precision: Precision, form: str) -> bool:
    """Whether the form holds int4 with these activations in any group."""
    fitting = ("",) if form == COMPRESSED else ("", "fp8/tensor")
    return precision.activations in fitting


def _remedy(precision: Precision, form: str) -> str:
    if precision.kind == "fp32":
        return "use --recipe bf16"
    if precision.kind == "int8" and form == HF:
        where = "--format compressed-tensors (vLLM, SGLang)"
        return f"use {where} or --format trtllm (engines of TensorRT-LLM 1.2 and older), or --recipe fp8"
    if precision.kind == "int4" and precision.symmetric and form_takes_int4(precision, form):
        return "use --group-size 128"
    if precision.kind == "nvfp4" and form == LEGACY:
        return "leave --format out"
    return f"use a recipe of {RECIPES[form]}"


def kv_cache_support(kind: str, form: str = HF) -> Support:
    """One storage of keys and values."""
    if kind in FLOAT_TYPES:
        return Support("native", "the server keeps the cache in the type it computes in")
    if kind in CACHES[form]:
        return Support("native", "one scale for all keys and one for all values of a layer, from calibration")
    remedy = "use --kv-cache fp8, or leave --kv-cache out"
    return Support("refused", f"{TITLES[form]} has no scales for a KV cache in {kind}", remedy)


def capabilities() -> dict[str, Support]:
    """Every precision and cache there is, by its name, whatever the model: what the first form that has it says."""
    table = {precision.describe(): _any_form(precision) for precision in all_precisions()}
    return table | {f"kv-cache {kind}": _any_cache(kind) for kind in KV_CACHES}


def _any_form(precision: Precision) -> Support:
    forms = [form for form in FORMS if precision_support(precision, form).usable]
    if not forms:
        return precision_support(precision)
    found = precision_support(precision, forms[0])
    only = "" if HF in forms else f" (--format {' or '.join(sorted(forms))})"
    return Support(found.level, f"{found.why}{only}")


def _any_cache(kind: str) -> Support:
    forms = [form for form in FORMS if kv_cache_support(kind, form).usable]
    return kv_cache_support(kind, forms[0] if forms else HF)


def recipe_support(config: ModelConfig, recipe: Recipe, engine: EngineOptions = PLAIN) -> Support:
    """A recipe for a model in the form that is asked for: refused with every reason, or native."""
    form = form_of(engine)
    if form not in FORMS:
        return Support("refused", f"unknown form {form!r}", f"use --format {', '.join(FORMS)}")
    refused = [part for part in _parts(config, recipe, engine, form) if not part.usable]
    if refused:
        reasons = list(dict.fromkeys(part.why for part in refused))
        return Support("refused", "; ".join(reasons), refused[0].remedy)
    names = dict.fromkeys(precision_support(p, form).why for p in _layer_precisions(recipe) if p.is_coded)
    return Support("native", ", ".join(names))


def _layer_precisions(recipe: Recipe) -> tuple[Precision, ...]:
    return (recipe.linear, *(override.precision for override in recipe.overrides))


def _parts(config: ModelConfig, recipe: Recipe, engine: EngineOptions, form: str) -> Iterator[Support]:
    for precision in _layer_precisions(recipe):
        yield precision_support(precision, form)
    yield kv_cache_support(recipe.kv_cache, form)
    yield from _float_parts(config, recipe, form)
    yield _one_algorithm(recipe, form)
    yield _shapes(config, recipe, form)
    yield _shards(config, recipe, engine, form)


def _float_parts(config: ModelConfig, recipe: Recipe, form: str) -> Iterator[Support]:
    """Head, embedding and floats among the layers: all in one type, which is also that of the cache."""
    kind = float_kind(config, recipe)
    for option, precision in (("--lm-head", recipe.lm_head), ("--embedding", recipe.embedding)):
        if precision != Precision(kind):
            why = f"{option[2:]} in {precision.describe()}: {TITLES[form]} has it in {kind} here"
            yield Support("refused", why, f"leave {option} out, or give {kind}")
    for precision in _layer_precisions(recipe):
        if precision.kind in FLOAT_TYPES and precision.kind != kind:
            yield Support("refused", f"layers in {precision.kind} beside floats in {kind}", f"give {kind} instead")
    if recipe.kv_cache in FLOAT_TYPES and recipe.kv_cache != kind:
        why = f"a KV cache in {recipe.kv_cache}: servers keep it in the type they compute in, {kind} here"
        fp8 = ", or use --kv-cache fp8" if recipe.linear.is_coded or form == LEGACY else ""
        yield Support("refused", why, f"leave --kv-cache out{fp8}")
    if recipe.kv_cache in CACHES[form] and recipe.kv_cache not in FLOAT_TYPES and not recipe.linear.is_coded:
        why = f"a KV cache in {recipe.kv_cache} under layers in {recipe.linear.kind}: vLLM reads no scales for it there"
        if form != LEGACY:
            yield Support("refused", why, "leave --kv-cache out, or quantize the layers too (--recipe fp8)")


def _one_algorithm(recipe: Recipe, form: str) -> Support:
    """Coded matrices all alike: consumers read one algorithm from a checkpoint, and modules left out of it."""
    if recipe.name == AUTO:
        why = f"recipe {AUTO} mixes precisions, and {TITLES[form]} is written with one for all quantized layers"
        return Support("refused", why, f"use a recipe of {RECIPES[form]}; target tvm and onnxruntime take any mixture")
    coded = list(dict.fromkeys(p for p in _layer_precisions(recipe) if p.is_coded))
    if len(coded) <= 1:
        return Support("native")
    names = ", ".join(precision.describe() for precision in coded)
    why = f"{TITLES[form]} is written with one precision for all quantized layers, not with {names}"
    return Support("refused", why, "give overrides in bf16 or fp16 alone; target tvm and onnxruntime take any")


def _shapes(config: ModelConfig, recipe: Recipe, form: str) -> Support:
    """ModelOpt packs rows of int4 in pairs."""
    if form == HF and recipe.linear.kind == "int4":
        odd = sorted({rows for rows, _ in config.linear_shapes.values() if rows % 2})
        if odd:
            why = f"int4 is packed in pairs of rows, and matrices have {', '.join(map(str, odd))}"
            return Support("refused", why, "use --format compressed-tensors")
    return Support("native")


def _shards(config: ModelConfig, recipe: Recipe, engine: EngineOptions, form: str) -> Support:
    """Only TensorRT-LLM checkpoints are cut: servers cut Hugging Face ones themselves."""
    tp, pp = engine.tensor_parallel, engine.pipeline_parallel
    if form != LEGACY:
        if (tp, pp) == (1, 1):
            return Support("native")
        why = f"{TITLES[form]} is never cut: the server does that when it loads"
        return Support("refused", why, "leave --tp and --pp out and give them to the server, or use --format trtllm")
    return shards.check(config, recipe, engine)
