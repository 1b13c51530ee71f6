"""Reading a TensorRT-LLM checkpoint back: the shards put together again, weights as its consumer decodes them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from exporter.core.config import ModelConfig, RopeConfig
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Recipe
from exporter.core.safetensors_file import TensorInfo, read_rows, read_whole_header
from exporter.core.strict_json import shorten
from exporter.core.weights import row_chunks
from targets.tensorrt_llm.loader_rounding import LOADER_BITS, rounded_by_loader
from targets.tensorrt_llm.trtllm_checks import (
    INPUT_CUT,
    StoredConfig,
    check_factors,
    check_names,
    check_replicas,
    fault,
    linear_shape,
    read_stored_config,
)

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
}
WHERE = {
    "self_attn.q_proj": ("attention.qkv", "q"),
    "self_attn.k_proj": ("attention.qkv", "k"),
    "self_attn.v_proj": ("attention.qkv", "v"),
    "self_attn.o_proj": ("attention.dense", ""),
    "mlp.gate_proj": ("mlp.fc", ""),
    "mlp.up_proj": ("mlp.gate", ""),
    "mlp.down_proj": ("mlp.proj", ""),
}
TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_layernorm"}
TABLES = {"model.embed_tokens.weight": "transformer.vocab_embedding.weight", "lm_head.weight": "lm_head.weight"}


def open_trtllm(path: Path, config: ModelConfig, recipe: Recipe) -> "TrtllmCheckpoint":
    """Open a checkpoint's directory; reads config.json and headers. `config` is the model it was made from.

    Raises ArtifactError (`stored.*`) for a rank file that is missing or damaged, or a config.json that makes no sense.
    """
    stored = read_stored_config(path)
    missing = [name for name in map(_rank_file, range(stored.world_size)) if not (path / name).is_file()]
    if missing:
        what = f"{len(missing)} of {stored.world_size} rank files are missing: {', '.join(missing[:5])}"
        raise fault("rank_missing", what)
    ranks = tuple(_header(path / _rank_file(rank)) for rank in range(stored.world_size))
    return TrtllmCheckpoint(path, config, stored, ranks)


@dataclass(frozen=True)
class TrtllmCheckpoint:
    """The files of all ranks as one model: a `targets.base.StoredModel`."""

    path: Path
    source: ModelConfig
    stored: StoredConfig
    ranks: tuple[Mapping[str, TensorInfo], ...]

    @cached_property
    def config(self) -> ModelConfig:
        """The source's. Files hold embedding and head apart: one matrix where they are equal, as in the source, and two
        where transforms made them differ."""
        source = self.source
        if not source.tie_word_embeddings or self._tables_are_equal():
            return source
        return replace(source, tie_word_embeddings=False, raw={**source.raw, "tie_word_embeddings": False})

    def validate(self) -> None:
        """Raise ArtifactError `stored.*` unless config.json belongs to the model and every file is as it says."""
        _check_model(self.stored, self.source)
        files = sorted(file.name for file in self.path.glob("rank*.safetensors"))
        if extra := [name for name in files if name not in map(_rank_file, range(len(self.ranks)))]:
            raise fault("rank_extra", f"{', '.join(extra[:5])} beside the {len(self.ranks)} ranks of config.json")
        for rank, tensors in enumerate(self.ranks):
            check_names(self.stored, rank, tensors)
            check_factors(rank, tensors)
        check_replicas(self.stored, list(self.ranks))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor by its Hugging Face name: float32 [n, K] or [n]. What factors multiply or
        divide inputs by counts as part of the weight."""
        values = self._decoded(name, start, stop)
        if not np.isfinite(values).all():
            raise fault("not_finite", f"{name} holds NaN or Inf (rows {start} to {stop})")
        return values

    @cached_property
    def input_scales(self) -> Mapping[str, float]:
        """By module, of what it rounds after any factors."""
        return {
            f"model.layers.{layer}.{name}": self._number(rank, f"{prefix}.{module}.activation_scaling_factor")
            for layer in range(self.stored.num_hidden_layers)
            for rank, prefix in [self._home(layer)]
            for name, (module, _) in WHERE.items()
            if f"{prefix}.{module}.activation_scaling_factor" in self.ranks[rank]
        }

    @cached_property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        """One for keys and values: TensorRT-LLM takes the larger of the two (`process_kv_scaling_factor` in
        tensorrt_llm/models/modeling_utils.py)."""
        if not self.stored.kv_cache_quant_algo:
            return {}
        scales = {}
        for layer in range(self.stored.num_hidden_layers):
            rank, prefix = self._home(layer)
            largest = max(self._number(rank, f"{prefix}.attention.{part}_cache_scaling_factor") for part in "kv")
            scales[layer] = (largest, largest)
        return scales

    @property
    def requantized(self) -> frozenset[str]:
        """FP8 has one scale for q, k and v, and one for gate and up. The loader that rounds W8A16 gives each shard of
        o_proj and down_proj scales of its own."""
        names: list[str] = []
        if self.stored.quant_algo == "FP8":
            names = [name for name, (module, _) in WHERE.items() if module not in INPUT_CUT]
        elif self.stored.quant_algo in LOADER_BITS and self.stored.tp_size > 1:
            names = [name for name, (module, _) in WHERE.items() if module in INPUT_CUT]
        layers = range(self.stored.num_hidden_layers)
        return frozenset(f"model.layers.{layer}.{name}.weight" for layer in layers for name in names)

    def _decoded(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in TABLES:
            return self._table(name, start, stop)
        if name == "model.norm.weight":
            return self._read(len(self.ranks) - 1, "transformer.ln_f.weight", start, stop)
        found = TENSOR.fullmatch(name)
        if found is None or int(found[1]) >= self.stored.num_hidden_layers:
            raise ValueError(f"no tensor {name!r}")
        layer, module, kind = int(found[1]), found[2], found[3]
        if module in NORMS:
            rank, prefix = self._home(layer)
            return self._read(rank, f"{prefix}.{NORMS[module]}.weight", start, stop)
        return self._linear(layer, module, kind, start, stop)

    def _table(self, name: str, start: int, stop: int) -> np.ndarray:
        stored = self.stored
        first = 0 if name != "lm_head.weight" else (stored.pp_size - 1) * stored.tp_size
        step = -(-stored.vocab_size // stored.tp_size)
        parts = [
            self._read(first + shard, TABLES[name], max(start - shard * step, 0), min(stop - shard * step, step))
            for shard in range(stored.tp_size)
            if start < (shard + 1) * step and stop > shard * step
        ]
        return np.concatenate(parts) if parts else np.empty((0, stored.hidden_size), np.float32)

    def _tables_are_equal(self) -> bool:
        shape = (self.stored.vocab_size, self.stored.hidden_size)
        embedding, head = TABLES
        return all(
            np.array_equal(self._table(embedding, *part), self._table(head, *part)) for part in row_chunks(shape)
        )

    def _linear(self, layer: int, name: str, kind: str, start: int, stop: int) -> np.ndarray:
        module, part = WHERE[name]
        rank, prefix = self._home(layer)
        tensor = f"{prefix}.{module}"
        if module in INPUT_CUT:
            if kind == "bias":
                return self._read(rank, f"{tensor}.bias", start, stop)
            shards = range(rank, rank + self.stored.tp_size)
            return np.concatenate([self._weight(shard, tensor, module, start, stop) for shard in shards], axis=1)
        read = self._bias if kind == "bias" else self._weight
        parts = [
            read(at, tensor, module, offset + max(start - first, 0), offset + min(stop - first, count))
            for at, first, count, offset in self._outputs(rank, module, part)
            if start < first + count and stop > first
        ]
        return np.concatenate(parts) if parts else read(rank, tensor, module, 0, 0)

    def _outputs(self, rank: int, module: str, part: str) -> Iterator[tuple[int, int, int, int]]:
        """Which rank holds which rows of a matrix: (rank, first row, rows, first row in the rank's tensor)."""
        stored, head = self.stored, self.stored.head_size
        queries = stored.num_attention_heads // stored.tp_size * head
        keys = stored.kv_heads * head
        copies = max(1, stored.tp_size // stored.num_key_value_heads)
        for shard in range(stored.tp_size):
            if part in ("k", "v"):
                if shard % copies == 0:
                    yield rank + shard, shard // copies * keys, keys, queries + (keys if part == "v" else 0)
            else:
                count = queries if part == "q" else linear_shape(stored, module)[0]
                yield rank + shard, shard * count, count, 0

    def _bias(self, rank: int, tensor: str, module: str, start: int, stop: int) -> np.ndarray:
        return self._read(rank, f"{tensor}.bias", start, stop)

    def _weight(self, rank: int, tensor: str, module: str, start: int, stop: int) -> np.ndarray:
        """Rows of one rank's matrix, times what its inputs are multiplied by."""
        values = self._codes_times_scales(rank, tensor, start, stop)
        tensors, width = self.ranks[rank], values.shape[1]
        if f"{tensor}.prequant_scaling_factor" in tensors:
            values = values * self._read(rank, f"{tensor}.prequant_scaling_factor", 0, width)
        if f"{tensor}.smoother" in tensors:
            values = values / self._read(rank, f"{tensor}.smoother", 0, 1)
        return values

    def _codes_times_scales(self, rank: int, tensor: str, start: int, stop: int) -> np.ndarray:
        algorithm = self.stored.algorithm(tensor)
        if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
            return self._int4(rank, tensor, start, stop)
        values = self._read(rank, f"{tensor}.weight", start, stop)
        if algorithm in LOADER_BITS:
            return rounded_by_loader(values, LOADER_BITS[algorithm]).dequantize()
        if algorithm is not None:
            values *= self._scales(rank, tensor, algorithm, start, stop)
        return values

    def _scales(self, rank: int, tensor: str, algorithm: str, start: int, stop: int) -> np.ndarray:
        """float32 [1] or [n, 1]."""
        if algorithm == "FP8":
            return self._read(rank, f"{tensor}.weights_scaling_factor", 0, 1)
        if algorithm == "W8A8_SQ_PER_CHANNEL":
            return self._read(rank, f"{tensor}.weights_scaling_factor", start, stop)[:, None]
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            return self._read(rank, f"{tensor}.per_channel_scale", start, stop)[:, None]
        return self._read(rank, f"{tensor}.per_channel_scale", 0, 1)[0, start:stop, None]

    def _int4(self, rank: int, tensor: str, start: int, stop: int) -> np.ndarray:
        """Two rows a byte, the even one low, signed; a scale for each group of columns."""
        info = self.ranks[rank][f"{tensor}.weight"]
        packed = read_rows(info, start // 2, -(-stop // 2)).astype(np.int16)
        rows = np.stack([(packed & 15), (packed >> 4) & 15], axis=1).reshape(-1, packed.shape[1])
        codes = ((rows ^ 8) - 8)[start % 2 : start % 2 + stop - start].astype(np.float32)
        scales = self._read(rank, f"{tensor}.weights_scaling_factor", start, stop)
        codes *= np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
        return codes

    def _read(self, rank: int, name: str, start: int, stop: int) -> np.ndarray:
        values: np.ndarray = read_rows(self.ranks[rank][name], start, stop).astype(np.float32)
        return values

    def _number(self, rank: int, name: str) -> float:
        return float(self._read(rank, name, 0, 1)[0])

    def _home(self, layer: int) -> tuple[int, str]:
        """The first rank that holds a layer, and its prefix there."""
        for stage in range(self.stored.pp_size):
            layers = self.stored.layers_of(stage)
            if layer in layers:
                return stage * self.stored.tp_size, f"transformer.layers.{layers.index(layer)}"
        raise ValueError(f"no layer {layer}")


FIXED: dict[str, Any] = {"position_embedding_type": "rope_gpt_neox", "rotary_pct": 1.0, "residual_mlp": False}
"""What every Llama has, and what TensorRT-LLM takes where a file does not say."""


def _check_model(stored: StoredConfig, config: ModelConfig) -> None:
    """config.json describes this model: sizes, and rotary embedding, which TensorRT-LLM takes as 10000 where a file
    does not say (tensorrt_llm/models/llama/config.py)."""
    pairs: dict[str, tuple[Any, Any]] = {
        "num_hidden_layers": (stored.num_hidden_layers, config.num_layers),
        "num_attention_heads": (stored.num_attention_heads, config.num_heads),
        "num_key_value_heads": (stored.num_key_value_heads, config.num_kv_heads),
        "hidden_size": (stored.hidden_size, config.hidden_size),
        "head_size": (stored.head_size, config.head_dim),
        "intermediate_size": (stored.intermediate_size, config.intermediate_size),
        "vocab_size": (stored.vocab_size, config.vocab_size),
        "norm_epsilon": (stored.raw.get("norm_epsilon", 1e-5), config.rms_norm_eps),
        "hidden_act": (stored.raw.get("hidden_act"), "silu"),
        "rotary": (_rope(stored.raw), config.rope),
        "attn_bias": (stored.attn_bias, config.attention_bias),
        "mlp_bias": (stored.mlp_bias, config.mlp_bias),
        **{name: (stored.raw.get(name, wanted), wanted) for name, wanted in FIXED.items()},
    }
    if stored.tp_size > 1:
        # Every rank has its rows of the embedding (`use_parallel_embedding`, tensorrt_llm/models/llama/model.py).
        pairs["use_parallel_embedding"] = (stored.raw.get("use_parallel_embedding"), True)
        pairs["embedding_sharding_dim"] = (stored.raw.get("embedding_sharding_dim", 0), 0)
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise fault("config", f"config.json: {name} is {shorten(found)}, the model has {shorten(wanted)}")


def _rope(raw: Mapping[str, Any]) -> RopeConfig | None:
    base, scaling = raw.get("rotary_base", 10000.0), raw.get("rotary_scaling")
    if not isinstance(base, int | float) or not math.isfinite(base):
        return None
    if scaling is None:
        return RopeConfig(theta=float(base))
    if not isinstance(scaling, dict):
        return None
    kind, factor = scaling.get("type", scaling.get("rope_type")), scaling.get("factor", 1.0)
    if kind != "llama3":
        return RopeConfig(str(kind), float(base), factor)
    # Defaults of RopeEmbeddingUtils.apply_llama3_scaling.
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    length = scaling.get("original_max_position_embeddings", 8192)
    return RopeConfig("llama3", float(base), scaling.get("factor", 8.0), low, high, length)


def _rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def _header(path: Path) -> Mapping[str, TensorInfo]:
    try:
        return read_whole_header(path, DTYPES)[1]
    except (InputError, UnsupportedError) as error:
        raise fault("file", error.message) from error
