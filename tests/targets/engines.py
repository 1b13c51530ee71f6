"""Engines of tiny checkpoints and what they are held to: the eager model with the very weights they store."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import repeat
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

# Of the inputs of matrices in tests, which reach about 4: some of E4M3's and of int8's range is left.
INPUT_SCALE = 0.04
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


def build_source(
    checkpoint: Path,
    recipe: Recipe,
    limits: Limits = LIMITS,
    kv_scales: Mapping[int, tuple[float, float]] | None = None,
) -> BuildSource:
    """`kv_scales` as calibration would give them; every matrix whose precision wants a calibrated scale of its input
    gets INPUT_SCALE."""
    opened = Checkpoint.open(checkpoint)
    scales = dict.fromkeys(map(str.removesuffix, opened.config.tensor_shapes, repeat(".weight")), INPUT_SCALE)
    canonical = canonical_llama(opened.config, limits.max_seq_len)
    model = apply_recipe(canonical, recipe, opened.config, {**scales, "lm_head": INPUT_SCALE})
    rows = WeightRows(opened, threads=1)
    return BuildSource(opened.config, recipe, model, opened, rows, limits, kv_scales=kv_scales)


def build(source: BuildSource, out: Path, model: CanonicalModel | None = None) -> Engine:
    """Build into a directory that may not exist yet; `model` replaces the canonical model of the source."""
    out.mkdir(parents=True, exist_ok=True)
    if model is not None:
        source = replace(source, model=model)
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
                stored = source.config.head_source if name == "lm_head.weight" else name
                precision = precision_of(recipe, name.removesuffix(".weight"))
                parameter.copy_(torch.from_numpy(stored_values(source, stored, precision)))
    return model


def precision_of(recipe: Recipe, module: str) -> Precision:
    """What a recipe asks of a module of the eager model."""
    if not module.startswith("model.layers."):
        return recipe.lm_head if module == "lm_head" else recipe.embedding
    layer, name = module.removeprefix("model.layers.").split(".", 1)
    return recipe.layer_precision(int(layer), name)


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
