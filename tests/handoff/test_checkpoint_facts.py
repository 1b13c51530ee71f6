"""What a directory of the target tensorrt-llm says it holds, from files as ModelOpt and llm-compressor write them."""

from pathlib import Path
from typing import Any

import pytest

from exporter.handoff.checkpoint_facts import CheckpointFacts, checkpoint_facts
from tests.handoff.samples import write_json


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    named = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}
    return {"dtype": "bfloat16", "quantization_config": named}


FLOAT8, TOKEN = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "dynamic": False}


@pytest.mark.parametrize(
    ("weights", "inputs", "algorithm"),
    [
        ({**FLOAT8, "strategy": "tensor"}, STATIC, "FP8"),
        ({**FLOAT8, "strategy": "channel"}, TOKEN, "FP8_PER_CHANNEL_PER_TOKEN"),
        ({**FLOAT8, "strategy": "channel"}, None, "FP8_WEIGHT_ONLY"),
        ({"num_bits": 8, "type": "int", "strategy": "channel"}, {"num_bits": 8, "type": "int"}, "W8A8_INT8"),
        ({"num_bits": 8, "type": "int", "strategy": "channel"}, None, "W8A16"),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, None, "W4A16"),
        ({"num_bits": 4, "type": "int", "strategy": "group"}, TOKEN, "W4A8_FP8"),
        ({"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float"}, "NVFP4"),
        ({"num_bits": 4, "type": "float", "group_size": 16}, None, "W4A16_NVFP4"),
    ],
)
def test_compressed_tensors(tmp_path: Path, weights: Any, inputs: Any, algorithm: str) -> None:
    found = checkpoint_facts(write_json(tmp_path, config=compressed(weights, inputs)))
    assert found == CheckpointFacts("compressed-tensors", algorithm, dtype="bfloat16")


def test_a_cache_in_compressed_tensors(tmp_path: Path) -> None:
    named = compressed({**FLOAT8, "strategy": "tensor"}, STATIC, kv_cache_scheme=STATIC)
    assert checkpoint_facts(write_json(tmp_path, config=named)).fp8_cache


@pytest.mark.parametrize("cache", ["FP8", None])
def test_modelopt(tmp_path: Path, cache: str | None) -> None:
    quantization = {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": cache, "group_size": 128}
    config = {"torch_dtype": "float16", "quantization_config": {"quant_method": "modelopt"}}
    directory = write_json(tmp_path, config=config, hf_quant_config={"quantization": quantization})
    assert checkpoint_facts(directory) == CheckpointFacts("hf", "W4A16_AWQ", cache == "FP8", dtype="float16")


def test_nothing_quantized(tmp_path: Path) -> None:
    assert checkpoint_facts(write_json(tmp_path, config={"dtype": "bfloat16"})) == CheckpointFacts(
        "hf", dtype="bfloat16"
    )


def test_tensorrt_llm(tmp_path: Path) -> None:
    config = {
        "dtype": "float16",
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL", "kv_cache_quant_algo": None},
    }
    found = checkpoint_facts(write_json(tmp_path, config=config))
    assert found == CheckpointFacts("trtllm", "W8A8_SQ_PER_CHANNEL", False, 2, 2, "float16")
