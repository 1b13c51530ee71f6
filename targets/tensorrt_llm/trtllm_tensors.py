"""The tensors of one rank of a TensorRT-LLM checkpoint: names, types and shapes, in the order of the file.

Names are those of the parameters that TensorRT-LLM's modules register (tensorrt_llm/quantization/layers.py; for
W4A16_AWQ, W4A8_AWQ and FP8 as `preprocess_perlayer_weights` in tensorrt_llm/models/modeling_utils.py takes them), the
same as modelopt's exporter writes.
"""

from collections.abc import Iterator

from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from targets.tensorrt_llm.formats import FLOAT_TYPES
from targets.tensorrt_llm.shards import Shards
from targets.tensorrt_llm.tensor_file import TensorSpec
from targets.tensorrt_llm.trtllm_config import (
    FP8,
    FP8_ROWWISE,
    KV_ALGORITHMS,
    MODULES,
    SMOOTHQUANT,
    SMOOTHQUANT_PLUGIN,
    W4A8_AWQ,
    Algorithm,
    algorithm_of,
    module_precision,
)

EMBEDDING, HEAD, LAST_NORM = "transformer.vocab_embedding.weight", "lm_head.weight", "transformer.ln_f.weight"
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
"""A layer's norms by TensorRT-LLM's names."""
CACHE_SCALES = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
"""Loaders of 0.18 and later join the first two, older ones read the third."""
ONES = ("prequant_scaling_factor", "smoother", "scale_to_int")
"""Factors of activations that our transforms have folded into weights, and one that nothing reads where scales are
made for each token (`SmoothQuantRmsNorm`)."""


def layer_prefix(shards: Shards, layer: int) -> str:
    """Layers count from 0 in every stage."""
    return f"transformer.layers.{shards.place(layer)[1]}"


def rank_tensors(shards: Shards, recipe: Recipe, rank: int) -> list[TensorSpec]:
    """Everything in the file of a rank."""
    config, stage = shards.config, rank // shards.tp
    kind = FLOAT_TYPES[recipe.lm_head.kind]
    table = (shards.vocabulary, config.hidden_size)
    first = [TensorSpec(EMBEDDING, kind, table)] if stage == 0 else []
    layers = [spec for layer in shards.stages[stage] for spec in _layer_tensors(shards, recipe, layer, kind)]
    if stage < shards.pp - 1:
        return [*first, *layers]
    return [*first, *layers, TensorSpec(LAST_NORM, kind, (config.hidden_size,)), TensorSpec(HEAD, kind, table)]


def _layer_tensors(shards: Shards, recipe: Recipe, layer: int, kind: str) -> Iterator[TensorSpec]:
    prefix = layer_prefix(shards, layer)
    plugin = False
    for module in MODULES:
        algorithm = algorithm_of(module_precision(recipe, layer, module))
        assert algorithm is not None, "refused by shards.check"
        plugin = plugin or algorithm == SMOOTHQUANT_PLUGIN
        yield from _module_tensors(shards, f"{prefix}.{module}", module, algorithm, kind)
    if recipe.kv_cache in KV_ALGORITHMS:
        yield from (TensorSpec(f"{prefix}.attention.{name}", "F32", (1,)) for name in CACHE_SCALES)
    for norm in NORMS:
        yield TensorSpec(f"{prefix}.{norm}.weight", kind, (shards.config.hidden_size,))
        if plugin:
            yield TensorSpec(f"{prefix}.{norm}.scale_to_int", "F32", (1,))


def _module_tensors(shards: Shards, prefix: str, module: str, algorithm: Algorithm, kind: str) -> Iterator[TensorSpec]:
    rows, width = shards.module_shape(module)
    if algorithm.weights == "int4":
        yield TensorSpec(f"{prefix}.weight", "I8", (rows // 2, width))
    else:
        stored = {"float": kind, "fp8": "F8_E4M3", "int8": "I8"}[algorithm.weights]
        yield TensorSpec(f"{prefix}.weight", stored, (rows, width))
    by_columns = shards.by_columns(MODULES[module][0])
    for name, dtype, shape in _factors(algorithm, rows, width, by_columns, kind):
        yield TensorSpec(f"{prefix}.{name}", dtype, shape)
    if has_bias(shards.config, module):
        yield TensorSpec(f"{prefix}.bias", kind, (rows,))


def _factors(
    algorithm: Algorithm, rows: int, width: int, by_columns: bool, kind: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of what stands beside a module's weight [rows, width]."""
    if algorithm == FP8:
        yield "weights_scaling_factor", "F32", (1,)
    elif algorithm == FP8_ROWWISE:
        yield "per_channel_scale", "F32", (rows,)
    elif algorithm == SMOOTHQUANT:
        yield "weights_scaling_factor", "F32", (rows,)
    elif algorithm == SMOOTHQUANT_PLUGIN:
        yield "per_channel_scale", "F32", (1, rows)
        if by_columns:
            yield "smoother", "F32", (1, width)
    elif algorithm.weights == "int4":
        yield "weights_scaling_factor", "F32", (rows, width // algorithm.group_size)
    if algorithm == SMOOTHQUANT or algorithm.weights == "int4":
        yield "prequant_scaling_factor", kind, (width,)
    if algorithm in (FP8, SMOOTHQUANT) or algorithm.name == W4A8_AWQ:
        yield "activation_scaling_factor", "F32", (1,)
    if algorithm.name == W4A8_AWQ:
        yield "weights_scaling_factor_2", "F32", (1,)


def has_bias(config: ModelConfig, module: str) -> bool:
    return config.attention_bias if module.startswith("attention") else config.mlp_bias
