"""config.json, hf_quant_config.json and generation_config.json of a Hugging Face checkpoint.

What is said of quantization is said twice, as modelopt 0.47 does: in hf_quant_config.json in the words of ModelOpt, in
config.json in those of compressed-tensors (modelopt/torch/export/quant_utils.py `process_layer_quant_config`,
convert_hf_config.py `convert_hf_quant_config_format`). TensorRT-LLM and SGLang read the first, vLLM the second.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exporter.core.config import ModelConfig, RopeConfig, read_json
from exporter.core.packages import installed_version
from exporter.core.recipe import Precision
from targets.tensorrt_llm.formats import TORCH_TYPES
from targets.tensorrt_llm.streamed_files import write_json

CONFIG, QUANT_CONFIG, GENERATION_CONFIG = "config.json", "hf_quant_config.json", "generation_config.json"
ALWAYS_EXCLUDED = ("lm_head", "model.embed_tokens")
AWQ = ("W4A16_AWQ", "W4A8_AWQ")
KV_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def producer() -> dict[str, str]:
    """Who wrote a checkpoint."""
    return {"name": "enginesmith", "version": installed_version("enginesmith") or "unknown"}


def quantization(
    algorithm: str, precision: Precision, kv_cache: str, excluded: Iterable[str], written_by: dict[str, str]
) -> dict[str, Any]:
    """hf_quant_config.json."""
    details: dict[str, Any] = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if kv_cache == "fp8" else None,
    }
    if algorithm in (*AWQ, "NVFP4"):
        details["group_size"] = precision.group_size
    if algorithm in AWQ:
        details |= {"has_zero_point": False, "pre_quant_scale": True}
    return {"producer": written_by, "quantization": {**details, "exclude_modules": list(excluded)}}


def inline(config: dict[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json for a hf_quant_config.json."""
    details = config["quantization"]
    found: dict[str, Any] = {}
    if (group := _group(details)) is not None:
        found["config_groups"] = {"group_0": {**group, "targets": ["Linear"]}}
    found |= {"ignore": details["exclude_modules"], "quant_algo": details["quant_algo"]}
    if details["kv_cache_quant_algo"]:
        found["kv_cache_scheme"] = KV_SCHEME
    return {**found, "producer": config["producer"], "quant_method": "modelopt"}


def _group(details: dict[str, Any]) -> dict[str, Any] | None:
    """ModelOpt describes these two so, and the others by their name alone."""
    bits = {"FP8": 8, "NVFP4": 4}.get(details["quant_algo"])
    if bits is None:
        return None
    one: dict[str, Any] = {"dynamic": False, "num_bits": bits, "type": "float"}
    if "group_size" in details:
        one["group_size"] = details["group_size"]
    return {"input_activations": one, "weights": dict(one)}


def excluded_modules(quantized: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Modules that are not quantized, as ModelOpt sums them up: a name, or `prefix*` or `prefix.*` where nothing
    quantized begins so (quant_utils.py, `_prefix_wildcard_summarize_exclude_modules`)."""
    coded = list(quantized)
    found: set[str] = set()
    for name in (*ALWAYS_EXCLUDED, *plain):
        found.add(_summary(name, coded))
    return sorted(found)


def _summary(name: str, quantized: list[str]) -> str:
    parts = name.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count])
        if not any(module.startswith(prefix) for module in quantized):
            return f"{prefix}*"
        if not any(module.startswith(f"{prefix}.") for module in quantized):
            return f"{prefix}.*"
    return name


def model_config(source: ModelConfig, kind: str, quantization_config: dict[str, Any] | None) -> dict[str, Any]:
    """config.json: the checkpoint's own, with the float type and the tying of the files."""
    found = dict(source.raw)
    types = {short: name for name, short in TORCH_TYPES.items()}
    key = "torch_dtype" if "torch_dtype" in found and "dtype" not in found else "dtype"
    found |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        key: types[kind],
        "tie_word_embeddings": source.tie_word_embeddings,
    }
    found = {**_older_rope(source), **found}
    return found if quantization_config is None else {**found, "quantization_config": quantization_config}


def _older_rope(source: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, for servers with transformers 4 (TensorRT-LLM 1.2): they know no
    `rope_parameters` and would compute positions with the default of 10000, without a word."""
    rope = source.rope
    if "rope_parameters" not in source.raw or rope == RopeConfig():
        return {}
    if rope.type == "default":
        return {"rope_theta": rope.theta}
    scaling = {name: value for name, value in source.raw["rope_parameters"].items() if name != "rope_theta"}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def write_configs(
    out_dir: Path, checkpoint: Path, source: ModelConfig, kind: str, quant_config: dict[str, Any] | None
) -> list[str]:
    """config.json, generation_config.json and, where matrices are quantized, hf_quant_config.json; their names."""
    write_json(out_dir / CONFIG, model_config(source, kind, inline(quant_config) if quant_config else None))
    write_generation_config(out_dir, checkpoint, source)
    if quant_config is None:
        return [CONFIG, GENERATION_CONFIG]
    write_json(out_dir / QUANT_CONFIG, quant_config)
    return [CONFIG, GENERATION_CONFIG, QUANT_CONFIG]


def write_generation_config(out_dir: Path, checkpoint: Path, source: ModelConfig) -> None:
    """The checkpoint's own; without one, what transformers would make of its config.json."""
    found = checkpoint / GENERATION_CONFIG
    if found.is_file():
        read_json(found, "checkpoint.config")
        write_json(out_dir / GENERATION_CONFIG, json.loads(found.read_bytes()))
        return
    named = {name: source.raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    values = {name: value for name, value in named.items() if value is not None}
    write_json(out_dir / GENERATION_CONFIG, {"_from_model_config": True, **values})
