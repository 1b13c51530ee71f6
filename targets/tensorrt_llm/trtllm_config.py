"""What a recipe is called in a TensorRT-LLM checkpoint, and its config.json.

TensorRT-LLM reads config.json with `PretrainedConfig.from_json_file` (tensorrt_llm/models/modeling_utils.py) and
`LLaMAConfig` (tensorrt_llm/models/llama/config.py); names of algorithms: tensorrt_llm/quantization/mode.py. modelopt's
exporter writes the same keys, but neither rotary_base nor rotary_scaling of transformers 5, without which TensorRT-LLM
takes 10000, and logits_dtype float16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.core.config import ModelConfig, RopeConfig
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import Precision, Recipe
from targets.tensorrt_llm.formats import FLOAT_TYPES, legacy_algorithm
from targets.tensorrt_llm.hf_config import producer

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""TensorRT-LLM's words for the type of everything that is not quantized."""
KV_ALGORITHMS = {"fp8": "FP8", "int8": "INT8"}
MODULES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""Matrices of a layer by TensorRT-LLM's names: `fc` is the one whose output is activated."""


@dataclass(frozen=True)
class Algorithm:
    """How TensorRT-LLM calls a precision (`name`: its quant_algo, None for floats) and keeps its weights.

    `weights`: float, fp8, int8 or int4. `whole`: it replaces attention and MLP as a whole, so that no matrix of them
    may be left out. `multiple`: what both sides of a matrix must be a multiple of, for each shard; the kernels pad
    otherwise (`WeightOnlyGroupwiseQuantLinear`, `WeightOnlyQuantLinear` in tensorrt_llm/quantization/layers.py), and
    weights of the unpadded shape do not load.

    Weight-only W8A16 and W4A16 keep float weights in the files: `trtllm-build` rounds them when it loads them
    (`weight_only_quantize_dict` in tensorrt_llm/models/convert_utils.py), into a layout of the GPU that it runs on.
    """

    name: str | None = None
    weights: str = "float"
    group_size: int = 0
    whole: bool = False
    multiple: int = 1


FLOAT = Algorithm()
FP8 = Algorithm("FP8", "fp8")
FP8_ROWWISE = Algorithm("FP8_PER_CHANNEL_PER_TOKEN", "fp8", whole=True)
SMOOTHQUANT = Algorithm("W8A8_SQ_PER_CHANNEL", "int8")
SMOOTHQUANT_PLUGIN = Algorithm("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "int8", whole=True)
WEIGHT_ONLY = (Algorithm("W8A16", multiple=64), Algorithm("W4A16", multiple=64))
W4A16_AWQ, W4A8_AWQ = "W4A16_AWQ", "W4A8_AWQ"
BY_NAME = {each.name: each for each in (FP8, FP8_ROWWISE, SMOOTHQUANT, SMOOTHQUANT_PLUGIN, *WEIGHT_ONLY)}


def algorithm_of(precision: Precision) -> Algorithm | None:
    """What TensorRT-LLM's engines make of matrices of a precision; None: nothing."""
    if precision.kind in FLOAT_TYPES:
        return FLOAT
    name = legacy_algorithm(precision)
    if name in (W4A16_AWQ, W4A8_AWQ):
        group = precision.group_size or 0
        return Algorithm(name, "int4", group, multiple=group)
    return BY_NAME.get(name) if name else None


def module_precision(recipe: Recipe, layer: int, module: str) -> Precision:
    """What is asked of `attention.qkv` ...: matrices that are stored as one have one precision (recipe.packs)."""
    return recipe.layer_precision(layer, MODULES[module][0])


def model_algorithm(config: ModelConfig, recipe: Recipe) -> Algorithm:
    """The one algorithm of a checkpoint: that of the first matrix that is quantized."""
    asked = [module_precision(recipe, layer, module) for layer in range(config.num_layers) for module in MODULES]
    found = (algorithm_of(precision) for precision in asked if precision.is_coded)
    return next((algorithm for algorithm in found if algorithm), FLOAT)


def left_out(config: ModelConfig, recipe: Recipe) -> list[str]:
    """Matrices that stay floats in a quantized checkpoint, by TensorRT-LLM's names."""
    return [
        f"transformer.layers.{layer}.{module}"
        for layer in range(config.num_layers)
        for module in MODULES
        if not module_precision(recipe, layer, module).is_coded
    ]


def config_json(config: ModelConfig, recipe: Recipe, engine: EngineOptions) -> dict[str, Any]:
    """config.json of a checkpoint, one for all ranks. `rank` is the last one's, as modelopt leaves it."""
    tp, pp = engine.tensor_parallel, engine.pipeline_parallel
    return {
        "producer": producer(),
        "architecture": "LlamaForCausalLM",
        "dtype": DTYPES[recipe.lm_head.kind],
        "logits_dtype": "float32",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_size": config.hidden_size,
        "norm_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": False,
        "residual_mlp": False,
        "bias": config.attention_bias,
        "attn_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rotary_pct": 1.0,
        "rotary_base": config.rope.theta,
        "rotary_scaling": rotary_scaling(config.rope),
        "rank": tp * pp - 1,
        "decoder": "llama",
        "rmsnorm": True,
        "lm_head_bias": False,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": dict(quantization(config, recipe)),
    }


def rotary_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """As tensorrt_llm/layers/attention.py reads it: `type` (or `rope_type`) and `factor`; the other three for llama3
    (`RopeEmbeddingUtils.apply_llama3_scaling` in tensorrt_llm/functional.py)."""
    if rope.type == "default":
        return None
    scaling: dict[str, Any] = {"type": rope.type, "rope_type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return scaling


def quantization(config: ModelConfig, recipe: Recipe) -> Mapping[str, Any]:
    """The fields of TensorRT-LLM's QuantConfig."""
    algorithm = model_algorithm(config, recipe)
    found: dict[str, Any] = {
        "quant_algo": algorithm.name,
        "kv_cache_quant_algo": KV_ALGORITHMS.get(recipe.kv_cache),
    }
    if algorithm.group_size:
        # Scales of AWQ are folded into the weights; its kernels take a factor for each input, ones here.
        found |= {"group_size": algorithm.group_size, "has_zero_point": False, "pre_quant_scale": True}
    if algorithm.name:
        # Weight-only ones are matched against names of weights too (weight_only_quantize_dict).
        star = "*" if algorithm in WEIGHT_ONLY else ""
        found["exclude_modules"] = [*_unquantized(algorithm), *(f"{name}{star}" for name in left_out(config, recipe))]
    return found


def _unquantized(algorithm: Algorithm) -> list[str]:
    """A list replaces TensorRT-LLM's own (quantize_layers and fp8_rowwise_quantize in
    tensorrt_llm/quantization/quantize.py), which protects the embedding from weight-only rounding, and the last norm
    from returning E4M3."""
    if algorithm == FP8_ROWWISE:
        return ["lm_head", "*ln_f", "*ln_embed"]
    return ["lm_head", "*vocab_embedding"] if algorithm in WEIGHT_ONLY else ["lm_head"]
