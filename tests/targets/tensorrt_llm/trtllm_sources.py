"""What checkpoints are built from in these tests: a tiny Llama, a recipe, and made-up scales of activations."""

from pathlib import Path
from typing import Any, cast

import numpy as np

from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.engine_options import EngineOptions
from exporter.core.progress import NoProgress
from exporter.core.recipe import CHANNEL, TENSOR, Override, Precision, Recipe
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource, Limits, RowReader
from targets.tensorrt_llm.trtllm_form import write_trtllm
from targets.tensorrt_llm.trtllm_reader import TrtllmCheckpoint, open_trtllm
from targets.tensorrt_llm.written import Written

SHAPE: dict[str, Any] = {
    "vocab_size": 333,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""Groups of 128 leave whole shards for tp 2, groups of 64 for tp 4."""
PRECISIONS = {
    "bf16": Precision("bf16"),
    "FP8": Precision("fp8", TENSOR, activations="fp8/tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Precision("fp8", CHANNEL, activations="fp8/token"),
    "W8A8_SQ_PER_CHANNEL": Precision("int8", CHANNEL, activations="int8/tensor"),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": Precision("int8", CHANNEL, activations="int8/token"),
    "W4A16_AWQ": Precision("int4", 128),
    "W4A16_AWQ/64": Precision("int4", 64),
    "W4A8_AWQ": Precision("int4", 128, activations="fp8/tensor"),
    "W8A16": Precision("int8", CHANNEL),
    "W4A16": Precision("int4", CHANNEL),
}


def recipe_of(name: str, kv_cache: str = "bf16", overrides: tuple[Override, ...] = (), kind: str = "bf16") -> Recipe:
    linear = Precision(kind) if name == "bf16" else PRECISIONS[name]
    return Recipe("test", linear, Precision(kind), Precision(kind), kv_cache, overrides=overrides)


def source_of(
    checkpoint: Path,
    recipe: Recipe,
    tp: int = 1,
    pp: int = 1,
    rows: RowReader | None = None,
    input_scales: dict[str, float] | None = None,
    kv_scales: dict[int, tuple[float, float]] | None = None,
) -> BuildSource:
    """Scales that nobody gives differ from module to module."""
    opened = Checkpoint.open(checkpoint)
    config = opened.config
    modules = [f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in config.linear_shapes]
    made_up = {module: 0.01 + 0.001 * number for number, module in enumerate(modules)}
    return BuildSource(
        config,
        recipe,
        cast(Any, None),
        opened,
        rows or WeightRows(opened),
        Limits(2, 64),
        kv_scales=kv_scales or {layer: (0.5 + layer, 2.5) for layer in range(config.num_layers)},
        input_scales=made_up if input_scales is None else input_scales,
        engine=EngineOptions(tp, pp, format="trtllm"),
    )


def written(source: BuildSource, out: Path) -> Written:
    out.mkdir(parents=True)
    return write_trtllm(source, out, NoProgress())


def reopened(source: BuildSource, out: Path) -> TrtllmCheckpoint:
    stored = open_trtllm(out, source.config, source.recipe)
    stored.validate()
    return stored


def whole(source: BuildSource, name: str, precision: Precision) -> np.ndarray:
    """A tensor as the source quantizes it, decoded: float32."""
    found = source.rows(CheckpointWeight((name,), precision), 0, source.checkpoint.tensors[name].shape[0])
    return found.dequantize() if isinstance(found, QuantizedRows) else found.astype(np.float32)
