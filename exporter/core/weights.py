"""Weights in a stream: the rows of a canonical weight, read from the checkpoint when they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision

CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [n, K] as integer codes, one code a byte.

    codes: int8 if symmetric, uint8 if not, [n, K]; scales: float32 [n, K / group];
    zero_points: uint8 [n, K / group] if asymmetric, else None. value = (code - zero_point) * scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    precision: Precision

    def dequantize(self) -> np.ndarray:
        """float32 [n, K]."""
        rows, width = self.codes.shape
        codes = self.codes.reshape(rows, self.scales.shape[1], -1).astype(np.float32)
        if self.zero_points is not None:
            codes -= self.zero_points[:, :, None].astype(np.float32)
        return (codes * self.scales[:, :, None]).reshape(rows, width)


def weight_shape(checkpoint: Checkpoint, weight: CheckpointWeight) -> tuple[int, ...]:
    """Shape of the stacked weight: [N, K], or [N] for norms and biases."""
    shapes = [checkpoint.tensors[name].shape for name in weight.sources]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def read_weight_rows(checkpoint: Checkpoint, weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the stacked weight as float32."""
    parts, first = [], 0
    for name in weight.sources:
        rows = checkpoint.tensors[name].shape[0]
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            parts.append(checkpoint.read_rows(name, low, high).astype(np.float32))
        first += rows
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def row_chunks(shape: tuple[int, ...], elements: int = CHUNK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a shape with about `elements` elements each."""
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, elements // width)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
