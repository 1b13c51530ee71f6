"""The engine's external data file: coded weights as TensorRT's DequantizeLinear reads them, written in a stream.

Scales of a matrix are collected and written behind its codes: only then is it known in which range they lie.
"""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from calibration.codecs import pack_nibbles
from calibration.positive_scales import positive_scales
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.base import RowReader
from targets.external_data import ExternalData, Region
from targets.tensorrt.block_scales import take_apart
from targets.tensorrt.formats import form_of, rounds_inputs, stored_group

CODE_TYPES = {
    "int8": ir.DataType.INT8,
    "int6": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "nvfp4": ir.DataType.FLOAT4E2M1,
}
HALF_TYPES = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
ORDINARY = 8
"""Binary orders of magnitude around 1 in which the largest value of a matrix may lie as it is. Beyond them half
precision would lose small values (the least normal fp16 number is 2^-14) or large ones."""
LARGEST_CODE = {"int8": 128.0, "int6": 32.0, "int4": 8.0, "fp8": 448.0, "nvfp4": 6.0}


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [N, K] in the file.

    `codes` [N, K]; `scales`: float32 [] or [N], float32 or a half type [N, K / group], or E4M3 [N, K / 16] that are
    multiplied by the float32 `matrix_scale`. Products with the decoded codes are to be multiplied by 2^`exponent`,
    and by `factors` float32 [N] if there are any.
    """

    name: str
    codes: ir.ExternalTensor
    scales: ir.TensorProtocol
    group: int
    exponent: int = 0
    matrix_scale: float | None = None
    factors: np.ndarray | None = None


class TypedWeights(ExternalData):
    """The external data with the matrices that TensorRT decodes; `half` is the type that it decodes them to."""

    def __init__(self, path: Path, checkpoint: Checkpoint, rows: RowReader, half: ir.DataType) -> None:
        super().__init__(path, checkpoint, rows)
        self.half = half
        self._matrices: dict[CheckpointWeight, CodedMatrix] = {}

    def coded(self, name: str, weight: CheckpointWeight) -> CodedMatrix:
        """A matrix of codes, called `name`; written when it is first asked for."""
        if weight not in self._matrices:
            self._matrices[weight] = self._write_coded(name, weight)
        return self._matrices[weight]

    def _write_coded(self, name: str, weight: CheckpointWeight) -> CodedMatrix:
        rows, width = self.shape(weight)
        precision = weight.precision
        code_type, group = CODE_TYPES[precision.kind], stored_group(precision, width)
        packed = code_type.bitwidth == 4
        codes = self._reserve(rows * width // (2 if packed else 1))
        scales = np.empty((rows, precision.groups(width)), np.float32)
        used = np.ones(scales.shape, bool)
        for start, chunk in self._chunks(weight, (rows, width)):
            if not isinstance(chunk, QuantizedRows):
                raise TypeError(f"rows of {name} are {chunk.dtype}, not {precision.describe()}")
            chunk = positive_scales(chunk)
            part = slice(start, start + len(chunk.codes))
            self._write(codes.offset + start * (codes.length // rows), _stored_codes(chunk, packed))
            scales[part] = chunk.scales
            used[part] = _used(chunk)
        _check_scales(name, scales)
        shown = self.tensor(f"{name}.codes", codes, code_type, (rows, width))
        return self._with_scales(name, weight, shown, group, scales, used)

    def _with_scales(
        self, name: str, weight: CheckpointWeight, codes: ir.ExternalTensor, group: int, scales: np.ndarray,
        used: np.ndarray,
    ) -> CodedMatrix:  # fmt: skip
        form = form_of(weight.precision)
        if form == "nvfp4":
            found = take_apart(scales, used, self.source_rows(weight))
            stored = self._scale_tensor(name, found.stored, ir.DataType.FLOAT8E4M3FN)
            return CodedMatrix(name, codes, stored, group, 0, found.matrix, found.factors)
        exponent = 0 if rounds_inputs(weight.precision) else _exponent(weight.precision, scales, used)
        scales = np.ldexp(scales, -exponent).astype(np.float32)
        if form == "rows":
            return CodedMatrix(name, codes, self._row_scales(name, scales[:, 0]), group, exponent)
        scales = np.repeat(scales, codes.shape.numpy()[1] // group // scales.shape[1], axis=1)
        dtype = self.half if form == "int4" else ir.DataType.FLOAT
        return CodedMatrix(name, codes, self._scale_tensor(name, scales, dtype), group, exponent)

    def _row_scales(self, name: str, scales: np.ndarray) -> ir.TensorProtocol:
        """float32 [N], or one number inside the model file where all rows have the same."""
        if (scales == scales[0]).all():
            return ir.tensor(scales[0].copy(), name=f"{name}.scales")
        return self._scale_tensor(name, scales, ir.DataType.FLOAT)

    def _scale_tensor(self, name: str, scales: np.ndarray, dtype: ir.DataType) -> ir.ExternalTensor:
        stored = scales.astype(HALF_TYPES[dtype]) if dtype in HALF_TYPES else scales
        region: Region = self._stored(stored)
        return self.tensor(f"{name}.scales", region, dtype, scales.shape)


def _stored_codes(rows: QuantizedRows, packed: bool) -> np.ndarray:
    """uint8: one code a byte, or two, the earlier one in the low nibble (onnx.proto, TensorProto.raw_data)."""
    return pack_nibbles(rows.codes) if packed else rows.codes.view(np.uint8)


def _used(rows: QuantizedRows) -> np.ndarray:
    """bool [n, groups]: whether any code of a group stands for more than zero."""
    codes = rows.codes.reshape(*rows.scales.shape, -1)
    magnitude = 7 if rows.precision.kind == "nvfp4" else 0x7F if rows.precision.kind == "fp8" else 0xFF
    return np.asarray((codes.view(np.uint8) & magnitude).any(axis=2))


def _check_scales(name: str, scales: np.ndarray) -> None:
    if not (np.isfinite(scales) & (scales > 0)).all():
        worst = scales.reshape(-1)[np.argmin(np.where(np.isfinite(scales), scales, -1).reshape(-1))]
        raise UnsupportedError(
            "tensorrt.scales", f"{name} has the scale {worst}", "quantize it again: scales are positive numbers"
        )


def _exponent(precision: Precision, scales: np.ndarray, used: np.ndarray) -> int:
    """The power of two that brings a matrix near 1 which is far from it; 0 for all others, and for all zeros."""
    largest = float(np.where(used, scales, 0).max(initial=0.0)) * LARGEST_CODE[precision.kind]
    if largest == 0:
        return 0
    exponent = int(np.frexp(largest)[1])
    return exponent if abs(exponent) > ORDINARY else 0
