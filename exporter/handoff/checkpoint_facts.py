"""Which quantized checkpoint a directory holds, read from the very files that a server will read.

Forms: the Hugging Face checkpoint of ModelOpt (hf_quant_config.json beside config.json; neither says anything where
nothing is quantized), compressed-tensors (`quantization_config` of config.json), and the TensorRT-LLM checkpoint
(config.json with a `mapping`, rankN.safetensors).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HF, COMPRESSED, TRTLLM = "hf", "compressed-tensors", "trtllm"
CONFIG, HF_QUANT = "config.json", "hf_quant_config.json"


@dataclass(frozen=True)
class CheckpointFacts:
    """`algorithm` in TensorRT-LLM's words (`FP8`, `W4A16_AWQ`; empty: not quantized), also for compressed-tensors;
    `fp8_cache`: keys and values are scaled for FP8; the ranks that a TensorRT-LLM checkpoint is cut into."""

    form: str = ""
    algorithm: str = ""
    fp8_cache: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = ""


NO_CHECKPOINT = CheckpointFacts()


def checkpoint_facts(directory: Path) -> CheckpointFacts:
    """Read config.json and hf_quant_config.json of a checkpoint that was just written."""
    config = _read(directory / CONFIG)
    if "mapping" in config:
        return _trtllm(config)
    dtype = str(config.get("dtype", config.get("torch_dtype", "")))
    named = config.get("quantization_config") or {}
    if named.get("quant_method") == COMPRESSED:
        return CheckpointFacts(COMPRESSED, _compressed(named), named.get("kv_cache_scheme") is not None, dtype=dtype)
    if not (directory / HF_QUANT).is_file():
        return CheckpointFacts(HF, dtype=dtype)
    quantized = _read(directory / HF_QUANT)["quantization"]
    cache = quantized.get("kv_cache_quant_algo") == "FP8"
    return CheckpointFacts(HF, quantized.get("quant_algo") or "", cache, dtype=dtype)


def _trtllm(config: Mapping[str, Any]) -> CheckpointFacts:
    quantized, mapping = config.get("quantization") or {}, config["mapping"]
    return CheckpointFacts(
        TRTLLM,
        quantized.get("quant_algo") or "",
        quantized.get("kv_cache_quant_algo") == "FP8",
        int(mapping.get("tp_size", 1)),
        int(mapping.get("pp_size", 1)),
        str(config.get("dtype", "")),
    )


def _compressed(named: Mapping[str, Any]) -> str:
    """The algorithm of the first group: bits and type of the weights, then those of the inputs."""
    groups: dict[str, dict[str, Any]] = named.get("config_groups") or {}
    group = next(iter(groups.values())) if groups else {}
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    bits, of_floats = weights.get("num_bits"), weights.get("type") == "float"
    if bits == 8 and of_floats:
        if not inputs:
            return "FP8_WEIGHT_ONLY"
        return "FP8_PER_CHANNEL_PER_TOKEN" if weights.get("strategy") == "channel" else "FP8"
    if bits == 8:
        return "W8A8_INT8" if inputs else "W8A16"
    if of_floats:
        return "NVFP4" if inputs else "W4A16_NVFP4"
    return "W4A8_FP8" if inputs else "W4A16"


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value
