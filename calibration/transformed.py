"""A checkpoint seen through transforms: the same function, other weights, still read tensor by tensor.

Everything is computed in float64 and rounded to float32 once for each side of a matrix that changes, so scales that
are powers of two change no digit. Rows come out alike, to the last bit, in whatever portions they are read.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from calibration.transforms import Transform, check_transforms, transformed_config
from calibration.weight_changes import Change, Operation, change_of
from exporter.core.checkpoint import EMBEDDING, Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.safetensors_file import TensorInfo
from exporter.core.weights import row_chunks

READ_ELEMENTS = 1 << 20
BLOCK_ELEMENTS = 1 << 15  # float64 blocks that stay in a core's second-level cache; larger ones take twice as long
FLOAT32 = np.dtype(np.float32)


def with_transforms(checkpoint: Checkpoint, transforms: Sequence[Transform]) -> Checkpoint:
    """The checkpoint with its weights transformed in order; the checkpoint itself when there are no transforms.

    Reads no weight. InputError (`transform.*`) for transforms that do not fit the architecture or one another.
    """
    if not transforms:
        return checkpoint
    if isinstance(checkpoint, TransformedCheckpoint):
        return with_transforms(checkpoint.original, (*checkpoint.transforms, *transforms))
    check_transforms(transforms, checkpoint.config)
    config = transformed_config(checkpoint.config, transforms)
    tensors = _tensors(checkpoint, config, transforms)
    return TransformedCheckpoint(checkpoint.path, config, tensors, checkpoint, tuple(transforms))


@dataclass(frozen=True)
class TransformedCheckpoint(Checkpoint):
    """`original` after `transforms`. Tensors that change are float32; the others stay as they are stored.

    A matrix whose rows mix as a whole (o_proj and down_proj in a rotated residual stream) is computed at the first
    read and kept until another such matrix is asked for. Safe to read from several threads.
    """

    original: Checkpoint
    transforms: tuple[Transform, ...]
    _last: "LastMatrix" = field(default_factory=lambda: LastMatrix(), repr=False, compare=False)
    _changes: dict[str, Change] = field(default_factory=dict, repr=False, compare=False)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a transformed tensor: float32, or the stored dtype where nothing changes it."""
        change, source = self._change(name), _source(self.original, name)
        if not change:
            return self.original.read_rows(source, start, stop)
        rows = self.tensors[name].shape[0]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of {name!r}, which has {rows}")
        if start == stop:
            return np.empty((0, *self.tensors[name].shape[1:]), np.float32)
        if change.span == rows:
            whole = self._last.get(name, lambda: self._compute(name, 0, rows))
            return np.array(whole[start:stop])
        low, high = start // change.span * change.span, -(-stop // change.span) * change.span
        return self._compute(name, low, high)[start - low : stop - low]

    def iterate_bytes(self) -> Iterator[bytes]:
        """Those of the original: transforms are recorded apart from the checkpoint."""
        return self.original.iterate_bytes()

    @cached_property
    def digest(self) -> str:
        """That of the original."""
        return self.original.digest

    def _change(self, name: str) -> Change:
        if name not in self._changes:
            self._changes[name] = change_of(name, self.transforms, self.config, self._read_norm)
        return self._changes[name]

    def _read_norm(self, count: int, name: str) -> np.ndarray:
        """A norm's weights after the first `count` transforms, float64."""
        change = change_of(name, self.transforms[:count], self.config, self._read_norm)
        values = self.original.read(name).astype(np.float64)[None]
        return _apply(change.along_columns, values, 0).reshape(-1)

    def _compute(self, name: str, start: int, stop: int) -> np.ndarray:
        change, source = self._change(name), _source(self.original, name)
        out = np.empty((stop - start, *self.tensors[name].shape[1:]), np.float32)
        with np.errstate(over="ignore"):  # told below, with the tensor's name
            for low, high in row_chunks(out.shape, READ_ELEMENTS):
                _along_rows(
                    change.along_rows, self.original.read_rows(source, start + low, start + high), out[low:high]
                )
            if change.along_columns:
                _along_columns(change.along_columns, out.reshape(len(out), -1), start)
        if not np.isfinite(out).all():
            what = f"tensor {name!r} leaves the range of float32 after its transforms"
            raise InputError("transform.overflow", what, "scales this far apart serve no purpose: calibrate again")
        return out


class LastMatrix:
    """The matrix asked for last. Whoever asks while it is being computed waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name = ""
        self._values = np.empty(0, np.float32)

    def get(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if name != self._name:
                self._name, self._values = "", np.empty(0, np.float32)
                self._values = compute()
                self._name = name
            return self._values


def _along_rows(operations: Sequence[Operation], rows: np.ndarray, out: np.ndarray) -> None:
    """Transform rows [n, K], or copy a vector [n], into float32."""
    if not operations:
        out[...] = rows
        return
    for low, high in row_chunks(rows.shape, BLOCK_ELEMENTS):
        out[low:high] = _apply(operations, rows[low:high].astype(np.float64), 0)


def _along_columns(operations: Sequence[Operation], matrix: np.ndarray, start: int) -> None:
    """Transform the columns of a float32 matrix [n, K], rows from `start` on, in place."""
    step = max(1, BLOCK_ELEMENTS // max(len(matrix), 1))
    for low in range(0, matrix.shape[1], step):
        block = np.ascontiguousarray(matrix[:, low : low + step].T, np.float64)
        matrix[:, low : low + step] = _apply(operations, block, start).T


def _apply(operations: Sequence[Operation], vectors: np.ndarray, start: int) -> np.ndarray:
    for operation in operations:
        vectors = operation.apply(vectors, start)
    return vectors


def _source(original: Checkpoint, name: str) -> str:
    """The original's tensor: a head that transforms have untied comes from the embedding."""
    return name if name in original.tensors else EMBEDDING


def _tensors(original: Checkpoint, config: ModelConfig, transforms: Sequence[Transform]) -> dict[str, TensorInfo]:
    """Tensors that change are said to be float32, at no place in any file."""
    tensors = {}
    for name, shape in config.tensor_shapes.items():
        stored = original.tensors[_source(original, name)]
        info = TensorInfo(name, stored.path, FLOAT32, shape, -1, math.prod(shape) * FLOAT32.itemsize)
        # Only whether it changes is asked here: no norm is read for that.
        changes = change_of(name, transforms, config, lambda count, norm: np.ones(1))
        tensors[name] = info if changes else stored
    return tensors
