"""The engine's external data file, with coded weights in the layouts of the kernels (stored_rows.py)."""

from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.weights import QuantizedRows
from targets.base import RowReader
from targets.external_data import ExternalData, Region
from targets.onnxruntime.stored_rows import stored_bits, stored_group, stored_rows, zero_point_bytes


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


class WeightFile(ExternalData):
    """The external data with the matrices that ONNX Runtime's kernels decode."""

    def __init__(self, path: Path, checkpoint: Checkpoint, rows: RowReader) -> None:
        super().__init__(path, checkpoint, rows)
        self._matrices: dict[CheckpointWeight, QuantizedMatrix] = {}

    def codes(
        self, matrix: QuantizedMatrix, suffix: str, shape: tuple[int, ...], dtype: ir.DataType = ir.DataType.UINT8
    ) -> ir.ExternalTensor:
        """The codes of a matrix in the shape that an operator wants."""
        return self.tensor(f"{matrix.name}.{suffix}", matrix.codes, dtype, shape)

    def scales(self, matrix: QuantizedMatrix, shape: tuple[int, ...], suffix: str = "scales") -> ir.ExternalTensor:
        """The scales of a matrix in the shape that an operator wants."""
        return self.tensor(f"{matrix.name}.{suffix}", matrix.scales, ir.DataType.FLOAT, shape)

    def quantized(self, name: str, weight: CheckpointWeight) -> QuantizedMatrix:
        """A matrix of codes; all regions are filled in one pass over the rows."""
        # What is asked of activations does not change what lies in the file.
        key = replace(weight, precision=weight.precision.weight_only)
        if key not in self._matrices:
            matrix = self._layout(name, weight)
            self._matrices[key] = matrix
            for start, chunk in self._chunks(weight, matrix.shape):
                if not isinstance(chunk, QuantizedRows):
                    raise TypeError(f"rows of {name} are {chunk.dtype}, not {weight.precision.describe()}")
                self._write_quantized(matrix, start, chunk)
        return self._matrices[key]

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
