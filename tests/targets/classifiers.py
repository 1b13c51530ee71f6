"""Classifiers of tiny checkpoints, built from the hand-written canonical model by either CPU target."""

from dataclasses import replace

import numpy as np
import torch

from calibration.insert_precision import apply_recipe
from calibration.weight_rows import WeightRows
from exporter.core.labelled import labelled
from exporter.core.task import Task
from targets.base import BuildSource
from tests.support.canonical_llama import canonical_llama
from tests.targets.engines import eager

LENGTHS = np.array([30, 7, 19])


def task_of(*ids: int) -> Task:
    return Task("classify", tuple(f"label {token}" for token in ids), ids)


def classifier(source: BuildSource, task: Task) -> BuildSource:
    """The source of an engine of the same recipe that tells labels apart."""
    checkpoint = labelled(source.checkpoint, task)
    model = apply_recipe(
        canonical_llama(checkpoint.config, source.limits.max_seq_len), source.recipe, checkpoint.config
    )
    rows = WeightRows(checkpoint, threads=1)
    return replace(source, config=checkpoint.config, model=model, checkpoint=checkpoint, rows=rows, task=task)


def label_logits(source: BuildSource, task: Task, ids: np.ndarray) -> np.ndarray:
    """transformers' own logits of the labels after each row's last valid id: float32 [B, L]. `source` is the plain
    one: the model is whole, with the values that the recipe leaves."""
    model = eager(source)
    with torch.no_grad():
        rows = [model(torch.from_numpy(row[None, :n])).logits[0, -1] for row, n in zip(ids, LENGTHS, strict=True)]
    return torch.stack(rows)[:, list(task.token_ids)].numpy()
