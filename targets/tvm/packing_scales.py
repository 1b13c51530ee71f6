"""The one-byte scales of groups of E2M1 codes, whose whole numbers are twice the values: E8M0, and E4M3 times a factor.

Both are exact: nothing is rounded that the recipe had not rounded before.
"""

import ml_dtypes
import numpy as np

from exporter.core.errors import UnsupportedError
from exporter.core.weights import QuantizedRows

HALF_BITS = 2.0**8
"""Kernels read an E4M3 byte as the float16 of the same bits, which is smaller by this."""
LARGEST_EXPONENT = 127 + 64
"""Of a stored power of two: kernels add up to 32 to it."""
SAME = 2.0**-20
"""Two numbers that differ by less than this part were one before float32 rounded them."""


def used_scales(rows: QuantizedRows) -> np.ndarray:
    """float32 [n, G], zero where all codes of the group are: such a scale says nothing."""
    groups = rows.codes.reshape(*rows.scales.shape, -1) & 7
    used: np.ndarray = np.where(groups.any(axis=2), rows.scales, np.float32(0))
    return used


def exponents(scales: np.ndarray) -> np.ndarray:
    """Half of each power of two as its E8M0 byte, 2^(byte - 127); what is 2^-126 or less becomes 0 as they read it."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    if (bits & np.uint32(0x807FFFFF)).any():
        raise _unstorable("an mxfp4 scale", "is no power of two")
    stored = np.maximum((bits >> 23).astype(np.int32) - 1, 0)
    if stored.max(initial=0) > LARGEST_EXPONENT:
        raise _unstorable("an mxfp4 scale", f"exceeds 2^{LARGEST_EXPONENT - 126}")
    return np.asarray(stored, np.uint8)


def row_factors(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, G], each an E4M3 number times one number of the row, as E4M3 bytes and factors float32 [n].

    The products come back but for float32 rounding. A row's largest scale has one of eight fractions in E4M3: each is
    tried until all scales of the row are E4M3 numbers. byte * factor is half the scale, as kernels read the byte.
    """
    stored, factors = np.zeros(scales.shape, np.uint8), np.zeros(len(scales), np.float32)
    top = scales.max(axis=1, initial=0.0).astype(np.float64)
    open_rows = np.flatnonzero(top)
    for fraction in range(14, 6, -1):
        # The largest of the row becomes 1.fraction * 2^8; with 15 that would be NaN, so 7.5 stands for it.
        largest = (fraction if fraction > 7 else 7.5) * 2.0**5
        exact = scales[open_rows] / top[open_rows, None] * largest
        found = exact.astype(ml_dtypes.float8_e4m3fn)
        fits = (np.abs(found.astype(np.float64) - exact) <= SAME * exact).all(axis=1)
        stored[open_rows[fits]] = found[fits].view(np.uint8)
        factors[open_rows[fits]] = top[open_rows[fits]] / largest * (HALF_BITS / 2)
        open_rows = open_rows[~fits]
    if open_rows.size or not np.isfinite(factors).all():
        raise _unstorable("a row of nvfp4 scales", "has no number that all of them are E4M3 multiples of")
    return stored, factors


def _unstorable(what: str, why: str) -> UnsupportedError:
    return UnsupportedError("tvm.scales", f"{what} {why}", "keep this matrix in another precision, such as int4")
