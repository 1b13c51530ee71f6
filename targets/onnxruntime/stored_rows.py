"""Rows of coded weights as the engine's kernels read them.

MatMulNBits and GatherBlockQuantized take integers in blocks (calibration/codecs.py). E2M1 values times 2 are integers
from -12 to 12, so nvfp4 and mxfp4 become their 8-bit integers with half the scale, exactly. MatMulBnb4 takes nf4 codes
two a byte, the earlier one in the high nibble, and its 16 levels are ours. fp8 bytes stay as they are.
"""

from dataclasses import dataclass

import numpy as np

from calibration.codecs import pack_nibbles, pack_zero_points, to_matmul_nbits
from calibration.coverage import kernel_group
from exporter.core.number_formats import decode_table
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

E2M1_KINDS = ("nvfp4", "mxfp4")
# GatherBlockQuantized and MatMulNBits assume it for 8-bit codes.
ZERO_CODE = 128


@dataclass(frozen=True)
class StoredRows:
    """Rows [n, K] in a kernel's layout: codes uint8 [n, bytes], scales float32 [n, K / group], zero points packed."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None


def in_blocks(precision: Precision) -> bool:
    """Whether MatMulNBits multiplies it, rounding activations to int8 block by block."""
    return precision.is_integer or precision.kind in E2M1_KINDS


def stored_bits(precision: Precision) -> int:
    """Bits of a weight in the file, its scale not counted."""
    if not precision.is_coded:
        return precision.bits
    return 4 if precision.kind in ("int4", "nf4") else 8


def stored_group(precision: Precision, width: int) -> int:
    """Weights of a row of `width` that have one scale in the file."""
    return kernel_group(precision, width) if precision.is_integer else precision.group_of(width)


def zero_point_bytes(bits: int, groups: int) -> int:
    """Bytes of the zero points of a row: packed as the codes are, then up to a whole byte."""
    return (groups * bits + 7) // 8


def matrix_bits(precision: Precision, rows: int, width: int) -> int:
    """Bits of a matrix [rows, width] in the file: codes, a float32 for each scale, zero points; gaps to the next page
    are not counted. A row that no block divides is refused: one scale stands for all."""
    bits = stored_bits(precision)
    if not precision.is_coded:
        return rows * width * bits
    groups = width // (stored_group(precision, width) or width)
    zero_points = 0 if precision.symmetric else 8 * zero_point_bytes(bits, groups)
    return rows * (width * bits + 32 * groups + zero_points)


def stored_rows(rows: QuantizedRows, group: int) -> StoredRows:
    """Rows as they lie in the file, with a scale for each `group` of weights."""
    kind = rows.precision.kind
    if kind == "fp8":
        return StoredRows(rows.codes, rows.scales)
    if kind == "nf4":
        return StoredRows(_pack_high_first(rows.codes), rows.scales)
    if kind in E2M1_KINDS:
        doubled = np.rint(2 * decode_table(kind)).astype(np.int16) + ZERO_CODE
        return StoredRows(doubled.astype(np.uint8)[rows.codes], rows.scales / np.float32(2))
    regrouped = _repeat_groups(rows, rows.codes.shape[1] // group)
    return StoredRows(to_matmul_nbits(regrouped), regrouped.scales, pack_zero_points(regrouped))


def _repeat_groups(rows: QuantizedRows, groups: int) -> QuantizedRows:
    """The same rows with scales and zero points repeated to `groups` a row."""
    times = groups // rows.scales.shape[1]
    if times == 1:
        return rows
    zero_points = None if rows.zero_points is None else np.repeat(rows.zero_points, times, axis=1)
    return QuantizedRows(rows.codes, np.repeat(rows.scales, times, axis=1), zero_points, rows.precision)


def _pack_high_first(codes: np.ndarray) -> np.ndarray:
    """Codes [n, K], one a byte -> uint8 [n, K / 2], the earlier one in the high nibble."""
    packed = pack_nibbles(codes)
    return packed << np.uint8(4) | packed >> np.uint8(4)
