"""Scales of NVFP4 blocks, taken apart again: E4M3 numbers, and the float32 of the matrix that they were multiplied by.

What calibration hands over are the products (exporter.core.weights.QuantizedRows). TensorRT wants the factors, as
NVIDIA's "Working with Quantized Types" has it under double quantization: DQ(DQ(codes, E4M3 scales), float32 scale).
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from exporter.core.errors import UnsupportedError

BLOCK = 16
"""Weights that share an E4M3 scale."""
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SAME = 2.0**-20
"""Two numbers that differ by less than this part were one before float32 rounded them."""
CHUNK_ELEMENTS = 1 << 18
LARGEST_MANTISSAS = (1.75, *(1 + eighth / 8 for eighth in (5, 4, 3, 2, 1, 0)), 1.875)
"""Fractions that a largest E4M3 number may have; 448 = 1.75 * 2^8 first, which abs-max scaling leads to."""


@dataclass(frozen=True)
class BlockScales:
    """E4M3 bytes uint8 [N, G], the float32 of the matrix, and where rows differ in it, what each row's products still
    have to be multiplied by: float32 [N]."""

    stored: np.ndarray
    matrix: float
    factors: np.ndarray | None


def take_apart(scales: np.ndarray, used: np.ndarray, source_rows: list[int]) -> BlockScales:
    """float32 [N, G], products of E4M3 numbers and one float32 for each of the stacked tensors (`source_rows` each).

    Scales of blocks where bool `used` [N, G] is false say nothing. Raises UnsupportedError for anything else.
    """
    stored = np.empty(scales.shape, np.uint8)
    factors = np.ones(len(scales), np.float32)
    first = 0
    for count in source_rows:
        part = slice(first, first + count)
        stored[part], factors[part] = _common_factor(np.where(used[part], scales[part], np.float32(0)))
        first += count
    matrix = float(factors.max(initial=0.0)) or 1.0
    same = bool((factors == np.float32(matrix)).all())
    return BlockScales(stored, matrix, None if same else factors / np.float32(matrix))


def _common_factor(scales: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """E4M3 bytes of the scales of one tensor, 0 for no scale, and what they were multiplied by."""
    top = float(scales.max(initial=0.0))
    if top == 0:
        return np.zeros(scales.shape, np.uint8), np.float32(1)
    for mantissa in LARGEST_MANTISSAS:
        # 1.875 * 2^8 would be NaN.
        largest = mantissa * (2.0**8 if mantissa <= 1.75 else 2.0**7)
        stored = _as_e4m3(scales, largest / top)
        if stored is not None:
            return stored, np.float32(top / largest)
    raise UnsupportedError(
        "tensorrt.scales",
        "the scales of an nvfp4 matrix have no float32 that all of them are E4M3 multiples of",
        "quantize it again: such scales come from no calibration of enginesmith",
    )


def _as_e4m3(scales: np.ndarray, factor: float) -> np.ndarray | None:
    """uint8 bytes of scales times a factor where all of them are E4M3 numbers, but for float32 rounding."""
    stored = np.empty(scales.shape, np.uint8)
    step = max(1, CHUNK_ELEMENTS // max(scales.shape[1], 1))
    for start in range(0, len(scales), step):
        exact = scales[start : start + step].astype(np.float64) * factor
        found = exact.astype(E4M3)
        if not (np.abs(found.astype(np.float64) - exact) <= SAME * exact).all():
            return None
        stored[start : start + step] = found.view(np.uint8)
    return stored
