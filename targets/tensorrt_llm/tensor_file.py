"""Safetensors files written in any order and in small pieces: the header first, then each piece at its place.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from exporter.core.disk import output_errors

ALIGNMENT = 8
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""What an array must be for each type of the format; E4M3 comes as its bytes."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, type in the words of the format, shape ([] for a scalar)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


class TensorFile:
    """`with TensorFile.create(path, specs) as file:` write every tensor, whole or by rows, in any order, from any
    thread. Leaving the block without an error checks that as many bytes of each tensor were written as it has.

    Tensors lie in the order of `specs`. Raises InputError (`output.full`, `output.write`) where the disk fails,
    ValueError for what is not in `specs` or does not fit.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> None:
        self.path = path
        self._specs = {spec.name: spec for spec in specs}
        if len(self._specs) != len(specs):
            raise ValueError(f"{path.name} has two tensors of one name")
        header, self._offsets = _layout(specs, metadata)
        self._written = dict.fromkeys(self._specs, 0)
        self._lock = Lock()
        with output_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(self._file, len(header) + sum(spec.nbytes for spec in specs))
                _write_all(self._file, header, 0)
            except OSError:
                os.close(self._file)
                raise

    @staticmethod
    def create(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> "TensorFile":
        """A new file of the right size; it must not exist."""
        return TensorFile(path, specs, metadata)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(self._specs.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if kind is None:
            unequal = [name for name, done in self._written.items() if done != self._specs[name].nbytes]
            if unequal:
                raise ValueError(f"{self.path.name}: {len(unequal)} tensors are not wholly written: {unequal[:5]}")

    def write(self, name: str, first_row: int, values: np.ndarray) -> None:
        """Rows from `first_row` on: values [n, ...] of the tensor's type and trailing shape ([] for a scalar)."""
        spec = self._specs[name]
        data = np.ascontiguousarray(values, DTYPES[spec.dtype]) if values.dtype == DTYPES[spec.dtype] else None
        rows = len(values) if spec.shape else 1
        if data is None or values.shape[1:] != spec.shape[1:] or values.ndim != len(spec.shape):
            raise ValueError(f"{name}: {values.dtype} {values.shape} for {spec.dtype} {spec.shape}")
        if not 0 <= first_row <= first_row + rows <= (spec.shape[0] if spec.shape else 1):
            raise ValueError(f"{name}: rows {first_row} to {first_row + rows} of {spec.shape}")
        self._put(spec, first_row * spec.row_bytes, data.reshape(-1).view(np.uint8))

    def write_columns(self, name: str, first_row: int, first_column: int, values: np.ndarray) -> None:
        """A block [n, m] of a tensor [N, M]: whole rows at once where it is as wide as the tensor."""
        spec = self._specs[name]
        if len(spec.shape) != 2 or values.ndim != 2 or first_column + values.shape[1] > spec.shape[1]:
            raise ValueError(f"{name}: {values.shape} from column {first_column} of {spec.shape}")
        if values.shape[1] == spec.shape[1]:
            self.write(name, first_row, values)
            return
        if values.dtype != DTYPES[spec.dtype] or not 0 <= first_row <= first_row + len(values) <= spec.shape[0]:
            raise ValueError(f"{name}: {values.dtype} {values.shape} for {spec.dtype} {spec.shape}")
        item = DTYPES[spec.dtype].itemsize
        for index, row in enumerate(np.ascontiguousarray(values)):
            start = (first_row + index) * spec.row_bytes + first_column * item
            self._put(spec, start, row.view(np.uint8))

    def _put(self, spec: TensorSpec, start: int, data: np.ndarray) -> None:
        with output_errors(self.path):
            _write_all(self._file, data.data, self._offsets[spec.name] + start)
        with self._lock:
            self._written[spec.name] += data.nbytes


def plan_shards(specs: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in their order, in files of at most `max_bytes` of data (a larger tensor stands alone)."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + spec.nbytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += spec.nbytes
    return shards


def _layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """The header with its length before it, and each tensor's first byte in the file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for spec in specs:
        starts[spec.name] = end
        span = [end, end + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _write_all(file: int, data: bytes | memoryview, start: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, start)
        view, start = view[done:], start + done
