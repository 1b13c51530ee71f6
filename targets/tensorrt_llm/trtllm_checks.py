"""What a TensorRT-LLM checkpoint must look like, told from its config.json alone, and whether its files do.

Nothing here is shared with what writes such checkpoints. Sources: tensorrt_llm/models/modeling_utils.py (`load`,
`preprocess_weights`: which names, types and shapes load), tensorrt_llm/quantization/layers.py (parameters of each
module), tensorrt_llm/mapping.py (ranks), tensorrt_llm/layers/attention.py (heads of a rank).
"""

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import read_json
from exporter.core.errors import ArtifactError, InputError
from exporter.core.safetensors_file import TensorInfo, read_rows
from exporter.core.strict_json import shorten

AGAIN = "build the checkpoint again, or copy it again"
KNOWN = (
    *(None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"),
    *("W4A16_AWQ", "W4A8_AWQ", "W8A16", "W4A16"),
)
FLOAT_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
E4M3, INT8, SINGLE = "float8_e4m3fn", "int8", "float32"
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
INPUT_CUT = ("attention.dense", "mlp.proj")
"""Modules whose inputs are cut between shards; the others' outputs are."""
MOST_RANKS = 1 << 16

Expected = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape by name."""


@dataclass(frozen=True)
class StoredConfig:
    """The fields of config.json that decide what the files hold, under TensorRT-LLM's names."""

    dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_size: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    tp_size: int
    pp_size: int
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    group_size: int
    exclude_modules: tuple[str, ...]
    attn_bias: bool
    mlp_bias: bool
    raw: Mapping[str, Any]

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def kv_heads(self) -> int:
        """Heads of keys on one rank (`Attention.num_attention_kv_heads`)."""
        return -(-self.num_key_value_heads // self.tp_size)

    def layers_of(self, stage: int) -> list[int]:
        """`Mapping.pp_layers`: numpy's and torch's split of a range into nearly equal parts."""
        return [int(layer) for layer in np.array_split(np.arange(self.num_hidden_layers), self.pp_size)[stage]]

    def algorithm(self, name: str) -> str | None:
        """That of a module by the name it has in its rank's file."""
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude_modules)
        return None if excluded else self.quant_algo


def read_stored_config(path: Path) -> StoredConfig:
    """config.json of a checkpoint's directory. ArtifactError `stored.config`."""
    try:
        raw = read_json(path / "config.json", "stored.config")
    except InputError as error:
        raise ArtifactError("stored.config", error.message, AGAIN) from error
    mapping, quantization = _object(raw, "mapping"), _object(raw, "quantization")
    if raw.get("architecture") != "LlamaForCausalLM":
        raise fault("config", f"config.json: architecture is {shorten(raw.get('architecture'))}")
    merged = {**raw, **mapping, **quantization}
    numbers = {
        field.name: _number(merged, field.name)
        for field in fields(StoredConfig)
        if field.type == "int" or field.type is int
    }
    excluded = quantization.get("exclude_modules") or ()
    if not isinstance(excluded, list | tuple) or not all(isinstance(name, str) for name in excluded):
        raise fault("config", f"config.json: exclude_modules is {shorten(excluded)}, no list of names")
    stored = StoredConfig(
        **numbers,
        dtype=raw.get("dtype", ""),
        quant_algo=quantization.get("quant_algo"),
        kv_cache_quant_algo=quantization.get("kv_cache_quant_algo"),
        exclude_modules=tuple(excluded),
        attn_bias=bool(raw.get("attn_bias", raw.get("bias", False))),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        raw=raw,
    )
    _check_config(stored, mapping)
    return stored


def _check_config(stored: StoredConfig, mapping: Mapping[str, Any]) -> None:
    if mapping.get("world_size") != stored.world_size or stored.world_size > MOST_RANKS:
        what = f"mapping has world_size {shorten(mapping.get('world_size'))}, tp {stored.tp_size}, pp {stored.pp_size}"
        raise fault("mapping", f"config.json: {what}")
    if stored.dtype not in FLOAT_TYPES:
        raise fault("config", f"config.json: dtype {shorten(stored.dtype)}")
    if stored.quant_algo not in KNOWN or stored.kv_cache_quant_algo not in (None, "FP8", "INT8"):
        what = f"quant_algo {shorten(stored.quant_algo)}, kv_cache_quant_algo {shorten(stored.kv_cache_quant_algo)}"
        raise fault("config", f"config.json: {what}")
    if "exclude_modules" in stored.raw["quantization"] and stored.algorithm("lm_head") is not None:
        raise fault("config", "config.json: exclude_modules leaves lm_head quantized, which is a float in the files")
    kv_heads, tp = stored.num_key_value_heads, stored.tp_size
    if stored.num_attention_heads % tp or stored.intermediate_size % tp or (kv_heads % tp and tp % kv_heads):
        what = (
            f"{tp} shards of {stored.num_attention_heads} and {kv_heads} heads and {stored.intermediate_size} channels"
        )
        raise fault("mapping", f"config.json: {what}")
    if stored.pp_size > stored.num_hidden_layers:
        raise fault("mapping", f"config.json: {stored.pp_size} stages of {stored.num_hidden_layers} layers")


def expected_tensors(stored: StoredConfig, rank: int) -> Expected:
    """Every tensor of a rank's file."""
    stage, last = rank // stored.tp_size, stored.pp_size - 1
    table = (-(-stored.vocab_size // stored.tp_size), stored.hidden_size)
    found: Expected = {"transformer.vocab_embedding.weight": (stored.dtype, table)} if stage == 0 else {}
    for local in range(len(stored.layers_of(stage))):
        found |= _layer(stored, f"transformer.layers.{local}")
    if stage == last:
        found |= {"transformer.ln_f.weight": (stored.dtype, table[1:]), "lm_head.weight": (stored.dtype, table)}
    return found


def linear_shape(stored: StoredConfig, module: str) -> tuple[int, int]:
    """Rows and columns that a rank multiplies with."""
    tp, hidden, heads = stored.tp_size, stored.hidden_size, stored.num_attention_heads
    if module == "attention.qkv":
        return (heads // tp + 2 * stored.kv_heads) * stored.head_size, hidden
    if module == "attention.dense":
        return hidden, heads // tp * stored.head_size
    rows = stored.intermediate_size // tp
    return (hidden, rows) if module == "mlp.proj" else (rows, hidden)


def _layer(stored: StoredConfig, prefix: str) -> Expected:
    found: Expected = {}
    for module in LINEARS:
        rows, width = linear_shape(stored, module)
        for name, what in _linear(stored, f"{prefix}.{module}", rows, width).items():
            found[f"{prefix}.{module}.{name}"] = what
        if stored.attn_bias if module.startswith("attention") else stored.mlp_bias:
            found[f"{prefix}.{module}.bias"] = (stored.dtype, (rows,))
    for norm in ("input_layernorm", "post_layernorm"):
        found[f"{prefix}.{norm}.weight"] = (stored.dtype, (stored.hidden_size,))
        if stored.quant_algo == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
            found[f"{prefix}.{norm}.scale_to_int"] = (SINGLE, (1,))
    if stored.kv_cache_quant_algo:
        names = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
        found |= {f"{prefix}.attention.{name}": (SINGLE, (1,)) for name in names}
    return found


def _linear(stored: StoredConfig, name: str, rows: int, width: int) -> Expected:
    one, per_row = (SINGLE, (1,)), (SINGLE, (rows,))
    match stored.algorithm(name):
        case "FP8":
            scales = {"weights_scaling_factor": one, "activation_scaling_factor": one}
            return {"weight": (E4M3, (rows, width)), **scales}
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return {"weight": (E4M3, (rows, width)), "per_channel_scale": per_row}
        case "W8A8_SQ_PER_CHANNEL":
            scales = {"weights_scaling_factor": per_row, "activation_scaling_factor": one}
            factor = {"prequant_scaling_factor": (stored.dtype, (width,))}
            return {"weight": (INT8, (rows, width)), **scales, **factor}
        case "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
            smoother = {"smoother": (SINGLE, (1, width))} if name.endswith(INPUT_CUT) else {}
            return {"weight": (INT8, (rows, width)), "per_channel_scale": (SINGLE, (1, rows)), **smoother}
        case "W4A16_AWQ" | "W4A8_AWQ" as algorithm:
            return _int4(stored, rows, width, algorithm == "W4A8_AWQ")
    return {"weight": (stored.dtype, (rows, width))}


def _int4(stored: StoredConfig, rows: int, width: int, with_fp8: bool) -> Expected:
    if stored.group_size not in (64, 128) or width % stored.group_size or rows % 2:
        raise fault("shape", f"groups of {stored.group_size} in rows of {width}, {rows} rows in pairs")
    found: Expected = {
        "weight": (INT8, (rows // 2, width)),
        "weights_scaling_factor": (SINGLE, (rows, width // stored.group_size)),
        "prequant_scaling_factor": (stored.dtype, (width,)),
    }
    more = {"activation_scaling_factor": (SINGLE, (1,)), "weights_scaling_factor_2": (SINGLE, (1,))}
    return {**found, **more} if with_fp8 else found


def check_names(stored: StoredConfig, rank: int, tensors: Mapping[str, TensorInfo]) -> None:
    """Names, types and shapes of a rank's file."""
    expected, file = expected_tensors(stored, rank), f"rank{rank}.safetensors"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise fault("tensor_missing", f"{file} lacks {_some(missing)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise fault("tensor_extra", f"{file} holds {_some(extra)}, which TensorRT-LLM does not know there")
    for name, (dtype, shape) in expected.items():
        info = tensors[name]
        if (info.dtype.name, info.shape) != (dtype, shape):
            what = f"{file}: {name} is {info.dtype.name} {list(info.shape)}, config.json asks for {dtype} {list(shape)}"
            raise fault("shape", what)


def check_factors(rank: int, tensors: Mapping[str, TensorInfo]) -> None:
    """Scales and factors are positive and finite."""
    for name, info in tensors.items():
        if not name.endswith(("_factor", "_factor_2", "_scale", "smoother", "scale_to_int")):
            continue
        values = read_rows(info, 0, info.shape[0]).astype(np.float32)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            what = f"{name} holds {values.reshape(-1)[bad[0]]:g} at {bad[0]}, and {bad.size - 1} others are like it"
            raise fault("scale", f"rank{rank}.safetensors: {what}; scales are positive and finite")


def check_replicas(stored: StoredConfig, ranks: list[Mapping[str, TensorInfo]]) -> None:
    """What every shard of a stage holds is the same on all of them: norms, numbers, whole biases, repeated heads."""
    for stage in range(stored.pp_size):
        shards = range(stage * stored.tp_size, (stage + 1) * stored.tp_size)
        for name in ranks[shards[0]]:
            if _replicated(name, ranks[shards[0]][name].shape):
                _same(name, [(rank, 0, ranks[rank][name].shape[0]) for rank in shards], ranks)
        repeat = stored.tp_size // stored.num_key_value_heads
        for first in shards[::repeat] if repeat > 1 else ():
            for name, rows in _head_rows(stored, ranks[first]):
                _same(name, [(rank, *rows) for rank in range(first, first + repeat)], ranks)


def _replicated(name: str, shape: tuple[int, ...]) -> bool:
    module, _, kind = name.rpartition(".")
    if kind == "per_channel_scale":
        return module.endswith(INPUT_CUT)
    if kind == "weights_scaling_factor":
        return shape == (1,) or (module.endswith(INPUT_CUT) and len(shape) == 1)
    if kind in ("bias", "prequant_scaling_factor"):
        return module.endswith(INPUT_CUT) == (kind == "bias")
    return kind not in ("smoother", "weight") or module.endswith(("layernorm", "ln_f"))


def _head_rows(stored: StoredConfig, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Rows of keys and values in each tensor of qkv that has rows."""
    rows, _ = linear_shape(stored, "attention.qkv")
    queries = rows - 2 * stored.kv_heads * stored.head_size
    for name, info in tensors.items():
        if (
            ".attention.qkv." in name
            and info.shape[0] in (rows, rows // 2)
            and not name.endswith("prequant_scaling_factor")
        ):
            yield name, (queries * info.shape[0] // rows, info.shape[0])


def _same(name: str, places: list[tuple[int, int, int]], ranks: list[Mapping[str, TensorInfo]]) -> None:
    first, *others = places
    wanted = read_rows(ranks[first[0]][name], *first[1:]).tobytes()
    for rank, start, stop in others:
        if read_rows(ranks[rank][name], start, stop).tobytes() != wanted:
            raise fault("replica", f"{name} differs between rank{first[0]}.safetensors and rank{rank}.safetensors")


def fault(kind: str, what: str) -> ArtifactError:
    return ArtifactError(f"stored.{kind}", what, AGAIN)


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise fault("config", f"config.json: {name} is {shorten(value)}")
    return value


def _number(merged: Mapping[str, Any], name: str) -> int:
    value = merged.get(name, 128 if name == "group_size" else None)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
        raise fault("config", f"config.json: {name} is {shorten(value)}")
    return value


def _some(names: list[str]) -> str:
    return ", ".join(shorten(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
