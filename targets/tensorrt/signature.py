"""What goes into an engine's graph and what comes out: one place for names, types and shapes."""

from dataclasses import dataclass
from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.task import Task

BATCH, SEQUENCE = "B", "S"
"""Dimensions that a step chooses; every other one is fixed."""
TYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class TensorSpec:
    """The type of an input or output, `float16`, and its shape; letters stand for what a step chooses."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class TypedModel:
    """A strongly typed ONNX graph on disk, with its weights beside it.

    `arithmetic` (`fp16`, `bf16`) is the type of attention and of matrices without rounded inputs, `cache_type` that of
    keys and values. `weights_bytes` counts weights alone, without gaps.
    """

    path: Path
    arithmetic: str
    cache_type: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    weights_bytes: int


def cache_names(config: ModelConfig, prefix: str) -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ... in the order of inputs and outputs."""
    return [f"{prefix}.{layer}.{which}" for layer in range(config.num_layers) for which in ("key", "value")]


def graph_inputs(config: ModelConfig, task: Task, cache_type: str, length: int) -> dict[str, TensorSpec]:
    """Inputs in order. `last_rows`: where in a row of this step its last valid token stands; `write_indices`: where
    its positions go in the cache, S of them for every row."""
    tokens = TensorSpec("int64", (BATCH, SEQUENCE))
    rows = TensorSpec("int64", (BATCH,))
    if task.classifies:
        return {"input_ids": tokens, "position_ids": tokens, "last_rows": rows}
    cache = _cache(config, cache_type, length)
    stepwise = {"input_ids": tokens, "position_ids": tokens, "write_indices": rows, "last_rows": rows}
    return stepwise | dict.fromkeys(cache_names(config, "past_key_values"), cache)


def graph_outputs(
    config: ModelConfig, task: Task, cache_type: str, length: int, logits: int | None = None
) -> dict[str, TensorSpec]:
    """Outputs in order; `present.N.key` lies at the address of `past_key_values.N.key`."""
    width = logits if logits is not None else len(task.labels) if task.classifies else config.vocab_size
    scores = {"logits": TensorSpec("float32", (BATCH, width))}
    if task.classifies:
        return scores
    return scores | dict.fromkeys(cache_names(config, "present"), _cache(config, cache_type, length))


def _cache(config: ModelConfig, cache_type: str, length: int) -> TensorSpec:
    return TensorSpec(TYPE_NAMES[cache_type], (BATCH, config.num_kv_heads, length, config.head_dim))
