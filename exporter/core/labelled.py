"""A checkpoint whose head has rows for some tokens alone, one a label: the same model, fewer logits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from exporter.core.checkpoint import HEAD, Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.safetensors_file import TensorInfo
from exporter.core.task import Task


def labelled_config(config: ModelConfig, task: Task) -> ModelConfig:
    """The architecture for a task: a classifier's head has one row for each label, and is a matrix of its own.

    `raw` stays what it was: it is the checkpoint's. Raises InputError for a token beyond the vocabulary.
    """
    if not task.classifies:
        return config
    for label, token in zip(task.labels, task.token_ids, strict=True):
        if not 0 <= token < config.vocab_size:
            what = f"label {label!r} is token {token}, the vocabulary has {config.vocab_size}"
            raise InputError("labels.token_id", what, f"token ids are 0 to {config.vocab_size - 1}")
    return replace(config, tie_word_embeddings=False, head_rows=len(task.token_ids))


def labelled(checkpoint: Checkpoint, task: Task) -> Checkpoint:
    """The checkpoint for a task: itself, or seen with a head [L, H] of its labels' rows. Reads no weight."""
    if not task.classifies:
        return checkpoint
    config = labelled_config(checkpoint.config, task)
    stored = checkpoint.tensors[checkpoint.config.head_source]
    shape = (len(task.token_ids), *stored.shape[1:])
    head = TensorInfo(HEAD, stored.path, stored.dtype, shape, -1, math.prod(shape) * stored.dtype.itemsize)
    tensors = {**checkpoint.tensors, HEAD: head}
    return LabelledCheckpoint(checkpoint.path, config, tensors, checkpoint, task.token_ids)


@dataclass(frozen=True)
class LabelledCheckpoint(Checkpoint):
    """`original` with the rows `token_ids` of its head (of the embedding, where that is tied) as `lm_head.weight`.

    Its identity is the original's: labels are recorded apart from the checkpoint.
    """

    original: Checkpoint
    token_ids: tuple[int, ...]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, stored dtype; those of the head lie apart in the original."""
        if name != HEAD:
            return self.original.read_rows(name, start, stop)
        if not 0 <= start <= stop <= len(self.token_ids):
            raise ValueError(f"rows {start} to {stop} of a head of {len(self.token_ids)} labels")
        source = self.original.config.head_source
        parts = [self.original.read_rows(source, token, token + 1) for token in self.token_ids[start:stop]]
        return np.concatenate([self.original.read_rows(source, 0, 0), *parts])

    def iterate_bytes(self) -> Iterator[bytes]:
        """Those of the original."""
        return self.original.iterate_bytes()

    @cached_property
    def digest(self) -> str:
        """That of the original."""
        return self.original.digest
