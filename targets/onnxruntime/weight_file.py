"""The external data file, written weight by weight and chunk by chunk, never a whole matrix in memory.

Layouts of coded weights are those of the kernels (targets/onnxruntime/stored_rows.py).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from targets.onnxruntime.stored_rows import stored_bits, stored_group, stored_rows, zero_point_bytes

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


@dataclass(frozen=True)
class QuantizedMatrix:
    """A coded matrix [N, K] in the file: codes (bits * N * K / 8 bytes, row after row), scales float32 [N, K / group]
    and, if asymmetric, zero points (uint8, packed along K like the codes)."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    codes: Region
    scales: Region
    zero_points: Region | None

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def group_bytes(self) -> int:
        return self.group_size * self.bits // 8

    @property
    def zero_point_bytes(self) -> int:
        """Bytes of zero points in a row."""
        return zero_point_bytes(self.bits, self.groups)

    def select(self, name: str, rows: tuple[int, int]) -> "QuantizedMatrix":
        """Some of its rows (first, behind last) as a matrix called `name`: a view of the same bytes."""
        zeros = self.zero_points.rows(rows, self.zero_point_bytes) if self.zero_points else None
        return replace(
            self,
            name=name,
            shape=(rows[1] - rows[0], self.shape[1]),
            codes=self.codes.rows(rows, self.groups * self.group_bytes),
            scales=self.scales.rows(rows, self.groups * 4),
            zero_points=zeros,
        )


class WeightFile:
    """Writes weights once each, however often they are asked for; `weights_bytes` counts them without padding."""

    def __init__(self, path: Path, checkpoint: Checkpoint, rows: RowReader) -> None:
        self.path = path
        self.weights_bytes = 0
        self._checkpoint, self._rows = checkpoint, rows
        self._end = 0
        self._written: dict[CheckpointWeight | RotaryTable, Region | QuantizedMatrix] = {}
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

    def codes(
        self, matrix: QuantizedMatrix, suffix: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.UINT8
    ) -> ir.ExternalTensor:
        """The codes of a matrix in the shape that an operator wants."""
        return self.tensor(f"{matrix.name}.{suffix}", matrix.codes, dtype, shape)

    def scales(self, matrix: QuantizedMatrix, shape: tuple[int, ...], suffix: str = "scales") -> ir.ExternalTensor:
        """The scales of a matrix in the shape that an operator wants."""
        return self.tensor(f"{matrix.name}.{suffix}", matrix.scales, ir.DataType.FLOAT, shape)

    def source_rows(self, weight: CheckpointWeight) -> list[int]:
        """How many rows each of its sources has."""
        return [self._checkpoint.tensors[name].shape[0] for name in weight.sources]

    def floats(self, name: str, weight: CheckpointWeight, rows: tuple[int, int] | None = None) -> ir.ExternalTensor:
        """A weight, or some of its rows, stored as float32, bfloat16 or float16 in the checkpoint's layout."""
        dtype, storage = FLOATS[weight.precision.kind]
        shape = self.shape(weight)
        region = self._written.get(weight)
        width = int(np.prod(shape[1:])) * storage.itemsize
        if region is None:
            region = self._reserve(shape[0] * width)
            self._written[weight] = region
            for start, chunk in self._chunks(weight, shape):
                if isinstance(chunk, QuantizedRows) or chunk.dtype != storage:
                    raise TypeError(f"rows of {name} are not {storage}")
                self._write(region.offset + start * width, chunk)
        assert isinstance(region, Region)
        first, behind = rows or (0, shape[0])
        return self.tensor(name, region.rows((first, behind), width), dtype, (behind - first, *shape[1:]))

    def table(self, name: str, table: RotaryTable) -> ir.ExternalTensor:
        """A rotary table, float32 [length, D / 2]; a further table of one name gets a number behind it."""
        values = table.values()
        named = self._tables.setdefault(name, [])
        if table not in named:
            named.append(table)
        number = named.index(table)
        region = self._written.get(table)
        if region is None:
            region = self._reserve(values.nbytes)
            self._written[table] = region
            self._write(region.offset, values)
        assert isinstance(region, Region)
        return self.tensor(f"{name}.{number}" if number else name, region, ir.DataType.FLOAT, values.shape)

    def quantized(self, name: str, weight: CheckpointWeight) -> QuantizedMatrix:
        """A matrix of codes; all regions are filled in one pass over the rows."""
        # What is asked of activations does not change what lies in the file.
        key = replace(weight, precision=weight.precision.weight_only)
        if key not in self._written:
            matrix = self._layout(name, weight)
            self._written[key] = matrix
            for start, chunk in self._chunks(weight, matrix.shape):
                if not isinstance(chunk, QuantizedRows):
                    raise TypeError(f"rows of {name} are {chunk.dtype}, not {weight.precision.describe()}")
                self._write_quantized(matrix, start, chunk)
        matrix_or_region = self._written[key]
        assert isinstance(matrix_or_region, QuantizedMatrix)
        return matrix_or_region

    def _layout(self, name: str, weight: CheckpointWeight) -> QuantizedMatrix:
        rows, width = self.shape(weight)
        precision, bits = weight.precision, stored_bits(weight.precision)
        group = stored_group(precision, width)
        groups = width // group
        return QuantizedMatrix(
            name=name,
            shape=(rows, width),
            bits=bits,
            group_size=group,
            codes=self._reserve(rows * width * bits // 8),
            scales=self._reserve(rows * groups * 4),
            zero_points=None if precision.symmetric else self._reserve(rows * zero_point_bytes(bits, groups)),
        )

    def _write_quantized(self, matrix: QuantizedMatrix, start: int, chunk: QuantizedRows) -> None:
        rows = stored_rows(chunk, matrix.group_size)
        self._write(matrix.codes.offset + start * matrix.groups * matrix.group_bytes, rows.codes)
        self._write(matrix.scales.offset + start * matrix.groups * 4, rows.scales)
        if rows.zero_points is not None and matrix.zero_points is not None:
            self._write(matrix.zero_points.offset + start * matrix.zero_point_bytes, rows.zero_points)

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

    def _write(self, offset: int, values: np.ndarray) -> None:
        view = np.ascontiguousarray(values).view(np.uint8).reshape(-1).data
        with output_errors(self.path):
            while view:
                done = os.pwrite(self._file, view, offset)
                view, offset = view[done:], offset + done
