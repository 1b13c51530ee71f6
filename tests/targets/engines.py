"""Engines of tiny checkpoints and what they are held to: the eager model with the very weights they store."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from calibration.insert_precision import apply_recipe
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CanonicalModel, CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.progress import NoProgress
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows
from targets.base import BuildResult, BuildSource, Limits, RunOptions
from targets.onnxruntime.runner import OnnxRuntimeRunner
from targets.registry import get_target
from tests.support.canonical_llama import canonical_llama

LIMITS = Limits(max_batch=3, max_seq_len=40)


def uniform(name: str, *precision: object) -> Recipe:
    chosen = Precision(*precision)  # type: ignore[arg-type]
    return Recipe(name, chosen, chosen, chosen)


RECIPES = {
    "fp32": uniform("fp32", "fp32"),
    "bf16": uniform("bf16", "bf16"),
    "fp16": uniform("fp16", "fp16"),
    "int8": uniform("int8", "int8", 32),
    "int4": uniform("int4", "int4", 32),
    "int6": uniform("int6", "int6", 32),
    "int4-asym": uniform("int4-asym", "int4", 16, False),
    "int8-asym": uniform("int8-asym", "int8", 64, False),
    "mixed": Recipe("mixed", Precision("int4", 16), Precision("bf16"), Precision("int8", 32, False)),
}


@dataclass(frozen=True)
class Engine:
    """A built engine with what it was built from."""

    path: Path
    source: BuildSource
    result: BuildResult

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def runner(self, batch: int = 1, hidden_states: bool = False, max_seq_len: int | None = None) -> OnnxRuntimeRunner:
        options = RunOptions(threads=1, batch=batch, hidden_states=hidden_states, max_seq_len=max_seq_len)
        runner = get_target("onnxruntime").runner(self.path, self.config, self.source.limits, options)
        assert isinstance(runner, OnnxRuntimeRunner)
        return runner


def build_source(checkpoint: Path, recipe: Recipe, limits: Limits = LIMITS) -> BuildSource:
    opened = Checkpoint.open(checkpoint)
    model = apply_recipe(canonical_llama(opened.config, limits.max_seq_len), recipe, opened.config)
    return BuildSource(opened.config, recipe, model, opened, WeightRows(opened, threads=1), limits)


def build(source: BuildSource, out: Path, model: CanonicalModel | None = None) -> Engine:
    """Build into a directory that may not exist yet; `model` replaces the canonical model of the source."""
    out.mkdir(parents=True, exist_ok=True)
    if model is not None:
        source = BuildSource(source.config, source.recipe, model, source.checkpoint, source.rows, source.limits)
    return Engine(out, source, get_target("onnxruntime").build(source, out, NoProgress()))


def eager(source: BuildSource) -> LlamaForCausalLM:
    """transformers' eager float32 model whose matrices hold the recipe's values, dequantized."""
    model = LlamaForCausalLM.from_pretrained(
        source.checkpoint.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    recipe = source.recipe
    if source.config.tie_word_embeddings:
        # One table read at two precisions: the head gets its own.
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                head = name == "lm_head.weight"
                precision = recipe.lm_head if head else recipe.embedding if "embed" in name else recipe.linear
                stored = source.config.head_source if head else name
                parameter.copy_(torch.from_numpy(stored_values(source, stored, precision)))
    return model


def stored_values(source: BuildSource, name: str, precision: Precision) -> np.ndarray:
    """A checkpoint tensor as float32 after a round trip through its precision."""
    rows = source.rows(CheckpointWeight((name,), precision), 0, source.checkpoint.tensors[name].shape[0])
    return rows.dequantize() if isinstance(rows, QuantizedRows) else np.asarray(rows).astype(np.float32)


def eager_logits(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """float32 [S, V] of one row of ids."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids[None])).logits[0].numpy()
    return logits


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)
