"""The external data file of an engine's ONNX graph, written weight by weight and chunk by chunk, never a whole matrix
in memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, RotaryTable
from exporter.core.checkpoint import Checkpoint
from exporter.core.disk import output_errors
from exporter.core.weights import QuantizedRows, row_chunks, weight_shape
from targets.base import RowReader

# ONNX Runtime maps external data when it starts on a page boundary.
ALIGNMENT = 4096
FLOATS = {
    "fp32": (ir.DataType.FLOAT, np.dtype(np.float32)),
    "bf16": (ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
    "fp16": (ir.DataType.FLOAT16, np.dtype(np.float16)),
}


Rows = np.ndarray | QuantizedRows


@runtime_checkable
class StreamedRows(Protocol):
    """A row reader that prepares a weight's rows ahead, in order, as (start, stop, rows)."""

    def iterate_rows(self, weight: CheckpointWeight) -> Iterator[tuple[int, int, Rows]]: ...


@dataclass(frozen=True)
class Region:
    """Bytes of the file: where they start and how many they are."""

    offset: int
    length: int

    def rows(self, rows: tuple[int, int], row_bytes: int) -> "Region":
        """The part that holds some rows (first, behind last)."""
        return Region(self.offset + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes)


class ExternalData:
    """Writes weights once each, however often they are asked for; `weights_bytes` counts them without padding."""

    def __init__(self, path: Path, checkpoint: Checkpoint, rows: RowReader) -> None:
        self.path = path
        self.weights_bytes = 0
        self._checkpoint, self._rows = checkpoint, rows
        self._end = 0
        self._floats: dict[CheckpointWeight | RotaryTable, Region] = {}
        self._tables: dict[str, list[RotaryTable]] = {}
        self._file = -1

    def __enter__(self) -> Self:
        with output_errors(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def shape(self, weight: CheckpointWeight) -> tuple[int, ...]:
        return weight_shape(self._checkpoint, weight)

    def tensor(self, name: str, region: Region, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """A view of a region as an initializer called `name`."""
        return ir.ExternalTensor(
            self.path.name, region.offset, region.length, dtype, shape=ir.Shape(shape), name=name,
            base_dir=self.path.parent,
        )  # fmt: skip

    def source_rows(self, weight: CheckpointWeight) -> list[int]:
        """How many rows each of its sources has."""
        return [self._checkpoint.tensors[name].shape[0] for name in weight.sources]

    def floats(self, name: str, weight: CheckpointWeight, rows: tuple[int, int] | None = None) -> ir.ExternalTensor:
        """A weight, or some of its rows, stored as float32, bfloat16 or float16 in the checkpoint's layout."""
        dtype, storage = FLOATS[weight.precision.kind]
        shape = self.shape(weight)
        region = self._floats.get(weight)
        width = int(np.prod(shape[1:])) * storage.itemsize
        if region is None:
            region = self._reserve(shape[0] * width)
            self._floats[weight] = region
            for start, chunk in self._chunks(weight, shape):
                if isinstance(chunk, QuantizedRows) or chunk.dtype != storage:
                    raise TypeError(f"rows of {name} are not {storage}")
                self._write(region.offset + start * width, chunk)
        first, behind = rows or (0, shape[0])
        return self.tensor(name, region.rows((first, behind), width), dtype, (behind - first, *shape[1:]))

    def table(self, name: str, table: RotaryTable) -> ir.ExternalTensor:
        """A rotary table, float32 [length, D / 2]; a further table of one name gets a number behind it."""
        values = table.values()
        named = self._tables.setdefault(name, [])
        if table not in named:
            named.append(table)
        number = named.index(table)
        region = self._floats.get(table)
        if region is None:
            region = self._floats[table] = self._stored(values)
        return self.tensor(f"{name}.{number}" if number else name, region, ir.DataType.FLOAT, values.shape)

    def _chunks(self, weight: CheckpointWeight, shape: tuple[int, ...]) -> Iterator[tuple[int, Rows]]:
        """(first row, rows), prepared ahead by a reader that can."""
        if isinstance(self._rows, StreamedRows) and len(shape) > 1:
            for start, _, rows in self._rows.iterate_rows(weight):
                yield start, rows
        else:
            for start, stop in row_chunks(shape):
                yield start, self._rows(weight, start, stop)

    def _reserve(self, length: int) -> Region:
        region = Region(self._end, length)
        self._end = -(-(region.offset + length) // ALIGNMENT) * ALIGNMENT
        self.weights_bytes += length
        return region

    def _stored(self, values: np.ndarray) -> Region:
        """A new region that holds these values."""
        region = self._reserve(values.nbytes)
        self._write(region.offset, values)
        return region

    def _write(self, offset: int, values: np.ndarray) -> None:
        view = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
        with output_errors(self.path):
            while view:
                done = os.pwrite(self._file, view, offset)
                view, offset = view[done:], offset + done
