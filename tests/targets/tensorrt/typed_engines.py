"""Typed graphs of tiny checkpoints, the steps that ONNX Runtime takes with them, and what they are held to."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from calibration.coverage import actual_precision
from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import Precision, Recipe
from exporter.core.task import GENERATE, Task
from exporter.core.weights import QuantizedRows
from exporter.parity.activations import round_activations
from targets.base import BuildSource, Limits, RowReader, RunOptions
from targets.tensorrt.cache_length import cache_length
from targets.tensorrt.engine_index import EngineIndex, StepProfile
from targets.tensorrt.formats import activation_rounding
from targets.tensorrt.lower import lower
from targets.tensorrt.served_rows import served_rows
from targets.tensorrt.signature import TypedModel
from targets.tensorrt.stand_in import StandIn, open_stand_in
from tests.targets.engines import INPUT_SCALE, build_source, eager, eager_logits, precision_of, random_ids, relative_l2

LIMITS = Limits(max_batch=3, max_seq_len=40)
LENGTHS = np.array([9, 4, 1])


def recipe_of(linear: Precision, half: str = "fp16", head: Precision | None = None) -> Recipe:
    """A recipe with this precision in the layers, and the type of arithmetic elsewhere."""
    return Recipe(linear.describe(), linear, head or Precision(half), Precision(half), kv_cache=half)


@dataclass(frozen=True)
class Typed:
    """A graph on disk with what it was made from."""

    source: BuildSource
    model: TypedModel

    def runner(self, batch: int = 1) -> StandIn:
        """The graph on ONNX Runtime's CPU kernels."""
        folder = self.model.path.parent
        _index(self).write(folder)
        return open_stand_in(folder, self.source.config, self.source.limits, RunOptions(1, batch))


def typed(checkpoint: Path, recipe: Recipe, out: Path, limits: Limits = LIMITS, task: Task = GENERATE) -> Typed:
    """The typed graph of a checkpoint in a directory that may not exist yet."""
    return typed_source(replace(build_source(checkpoint, recipe, limits), task=task), out)


def typed_source(source: BuildSource, out: Path) -> Typed:
    out.mkdir(parents=True, exist_ok=True)
    return Typed(source, lower(source, out, lambda fraction, text: None))


def reference(source: BuildSource) -> torch.nn.Module:
    """The eager model with the stored weights, its matrices' inputs rounded as the engine rounds them."""
    model = eager(replace(source, rows=_actual(source)))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            precision = precision_of(source.recipe, name)
            if how := activation_rounding(precision):
                module.register_forward_pre_hook(
                    lambda _, given, how=how: (round_activations(given[0], 0, how, INPUT_SCALE),)
                )
    return model


def _actual(source: BuildSource) -> RowReader:
    """Rows as the engine holds them, also of matrices that stay float32 because groups do not divide their width."""
    served = served_rows(source.rows)

    def rows(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        width = source.checkpoint.tensors[weight.sources[0]].shape[1]
        return served(replace(weight, precision=actual_precision(weight.precision, width)), start, stop)

    return rows


def errors(engine: Typed) -> list[float]:
    """Relative L2 of a ragged prefill and four steps of decoding, against one pass of the reference a whole row."""
    model, ids = reference(engine.source), random_ids(engine.source.config, 3, 14)
    want = [eager_logits(model, row) for row in ids]
    rows, found = np.arange(3), []
    with engine.runner(batch=3) as runner:
        logits = runner.prefill(ids[:, :9], LENGTHS)
        found += [relative_l2(logits[row], want[row][runner.lengths[row] - 1]) for row in rows]
        for _ in range(4):
            logits = runner.decode(ids[rows, runner.lengths], np.array([True] * 3))
            found += [relative_l2(logits[row], want[row][runner.lengths[row] - 1]) for row in rows]
    return found


def _index(engine: Typed) -> EngineIndex:
    source, model = engine.source, engine.model
    config, classifies = source.config, source.task.classifies
    batch = (1, 1, source.limits.max_batch)
    prefill = StepProfile("prefill", batch, (1, 16, source.limits.max_seq_len if classifies else 16))
    return EngineIndex(
        toolkit="tensorrt_rtx",
        version="1.7.1.116",
        compute_capabilities=("8.9",),
        arithmetic=model.arithmetic,
        cache_type=model.cache_type,
        cache_length=0 if classifies else cache_length(source.limits),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        outputs=int(model.outputs["logits"].shape[1]),
        task=source.task.kind,
        profiles=(prefill,) if classifies else (StepProfile("decode", batch, (1, 1, 1)), prefill),
    )
