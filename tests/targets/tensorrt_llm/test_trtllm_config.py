"""config.json of TensorRT-LLM checkpoints: the keys of LLaMAConfig and QuantConfig, rotary embedding above all."""

import fnmatch
from pathlib import Path

import numpy as np
import pytest

from exporter.core.config import parse_config
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import Override, Precision, all_precisions
from targets.tensorrt_llm.trtllm_config import algorithm_of, config_json, rotary_scaling
from tests.support.tiny import LLAMA3_ROPE, write_checkpoint
from tests.targets.tensorrt_llm.trtllm_sources import PRECISIONS, SHAPE, recipe_of, reopened, source_of, written

CONFIG = parse_config({"architectures": ["LlamaForCausalLM"], **SHAPE, "rope_theta": 500000.0, "attention_bias": True})


def test_the_keys_of_a_model_cut_in_four() -> None:
    found = config_json(CONFIG, recipe_of("FP8", "fp8"), EngineOptions(2, 2))
    producer = found.pop("producer")
    assert producer["name"] == "enginesmith"
    assert found == {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 256,
        "norm_epsilon": 1e-6,
        "vocab_size": 333,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "head_size": 32,
        "intermediate_size": 512,
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": False,
        "residual_mlp": False,
        "bias": True,
        "attn_bias": True,
        "mlp_bias": False,
        "rotary_pct": 1.0,
        "rotary_base": 500000.0,
        "rotary_scaling": None,
        "rank": 3,
        "decoder": "llama",
        "rmsnorm": True,
        "lm_head_bias": False,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }


def test_quantization_of_each_algorithm() -> None:
    found = {name: config_json(CONFIG, recipe_of(name), EngineOptions())["quantization"] for name in PRECISIONS}
    assert {name: quantization["quant_algo"] for name, quantization in found.items()} == {
        name: None if name == "bf16" else name.split("/")[0] for name in PRECISIONS
    }
    assert found["bf16"] == {"quant_algo": None, "kv_cache_quant_algo": None}
    for name, group in (("W4A16_AWQ", 128), ("W4A16_AWQ/64", 64), ("W4A8_AWQ", 128)):
        wanted = {"group_size": group, "has_zero_point": False, "pre_quant_scale": True}
        assert {key: found[name][key] for key in wanted} == wanted
    # A list of ours replaces TensorRT-LLM's own, which these two need (quantization/quantize.py).
    assert "*ln_f" in found["FP8_PER_CHANNEL_PER_TOKEN"]["exclude_modules"]
    assert "*vocab_embedding" in found["W8A16"]["exclude_modules"]


def test_a_recipe_whose_first_layers_are_floats_is_still_quantized() -> None:
    recipe = recipe_of("FP8", overrides=(Override("layers.0.*", Precision("bf16")),))
    found = config_json(CONFIG, recipe, EngineOptions())["quantization"]
    assert found["quant_algo"] == "FP8"
    assert "transformer.layers.0.attention.qkv" in found["exclude_modules"]
    assert "transformer.layers.1.attention.qkv" not in found["exclude_modules"]


def test_weights_left_out_of_weight_only_rounding_are_matched_by_both_of_their_names() -> None:
    recipe = recipe_of("W8A16", overrides=(Override("layers.1.*", Precision("bf16")),))
    excluded = config_json(CONFIG, recipe, EngineOptions())["quantization"]["exclude_modules"]
    for name in ("transformer.layers.1.mlp.fc", "transformer.layers.1.mlp.fc.weight", "lm_head"):
        assert any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)
    for name in ("transformer.layers.10.mlp.fc", "transformer.layers.0.mlp.fc.weight", "transformer.layers.0.mlp.gate"):
        assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)


@pytest.mark.parametrize("kind,wanted", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_type_of_floats(kind: str, wanted: str) -> None:
    assert config_json(CONFIG, recipe_of("bf16", kind=kind), EngineOptions())["dtype"] == wanted


def tensorrt_llm_frequencies(base: float, scaling: dict[str, float], size: int) -> np.ndarray:
    """RopeEmbeddingUtils.create_sinusoidal_positions_for_attention_plugin of tensorrt_llm/functional.py, in float64."""
    frequencies = 1.0 / base ** (np.arange(0, size, 2) / size)
    if scaling is None:
        return frequencies
    factor = scaling.get("factor", 1.0)
    if scaling.get("type") == "linear":
        return frequencies / factor
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    length = scaling.get("original_max_position_embeddings", 8192)
    wavelengths = 2 * np.pi / frequencies
    smooth = (length / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    small, large = wavelengths < length / high, wavelengths > length / low
    return np.where(small, frequencies, np.where(large, frequencies / factor, blended))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_rotary_fields_give_the_models_frequencies(rope: dict[str, object]) -> None:
    config = parse_config({"architectures": ["LlamaForCausalLM"], **SHAPE, **rope})
    found = config_json(config, recipe_of("bf16"), EngineOptions())
    ours = config.rope.inverse_frequencies(config.head_dim)
    theirs = tensorrt_llm_frequencies(found["rotary_base"], found["rotary_scaling"], config.head_dim)
    np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_plain_rotary_embedding_has_no_scaling() -> None:
    assert rotary_scaling(CONFIG.rope) is None


@pytest.mark.parametrize("shape", ["llama3_rope", "linear_rope"])
def test_the_reader_finds_the_rotary_embedding_again(tmp_path: Path, shape: str) -> None:
    source = source_of(write_checkpoint(tmp_path / "llama", shape), recipe_of("bf16"), 2)
    written(source, tmp_path / "out")
    reopened(source, tmp_path / "out")


def test_precisions_without_kernels_have_no_algorithm() -> None:
    known = {precision: algorithm_of(precision) for precision in all_precisions()}
    for precision, algorithm in known.items():
        if not precision.symmetric or precision.kind in ("int6", "nf4", "nvfp4", "mxfp4"):
            assert algorithm is None, precision.describe()
    assert {found.name for found in known.values() if found} >= {name.split("/")[0] for name in PRECISIONS} - {"bf16"}
