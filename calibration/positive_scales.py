"""Rows whose scales are positive, as the tools of GPUs ask.

Symmetric codes of 4 and 6 bits reach one farther below zero than above, so calibration.rtn gives a group the sign that
maps its largest weight to that code (-8). modelopt refuses scales that are not positive, and TensorRT documents none.
Negating codes and scale keeps every value but that of the lowest code, whose negative does not exist (8): it becomes
the next (7), and the scale of its group is fitted to the values once more. Of Gaussian and t-distributed weights in
groups of 32, 64 and 128 that adds 13 to 18 % to the squared error; a search among positive scales alone would add 9 to
13 %, plain scales (amax / 7) 37 to 49 %. Where a scale was positive nothing changes.
"""

from dataclasses import replace

import numpy as np

from calibration.half_scales import as_half
from exporter.core.weights import QuantizedRows


def positive_scales(rows: QuantizedRows) -> QuantizedRows:
    """The rows themselves where no scale is negative; each group's result depends on that group alone."""
    if not rows.precision.is_integer or rows.zero_points is not None or not (rows.scales < 0).any():
        return rows
    count, width = rows.codes.shape
    codes = rows.codes.reshape(-1, width // rows.scales.shape[1]).copy()
    scales = rows.scales.reshape(-1).copy()
    negative = scales < 0
    top = np.int8(2 ** (rows.precision.bits - 1) - 1)
    exact = -codes[negative].astype(np.float32)
    clipped = np.minimum(exact, np.float32(top))
    codes[negative] = clipped.astype(np.int8)
    scales[negative] = _fitted(exact, clipped, -scales[negative])
    return replace(rows, codes=codes.reshape(count, width), scales=scales.reshape(rows.scales.shape))


def _fitted(exact: np.ndarray, clipped: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The scales [n] of least squared error for codes [n, g] that were clipped; the others as they are."""
    product, norm = np.vecdot(exact, clipped), np.vecdot(clipped, clipped)
    changed = (exact != clipped).any(axis=1)
    fitted = as_half((scales * product / np.maximum(norm, np.float32(1)))[:, None])[:, 0]
    return np.where(changed, fitted, scales).astype(np.float32)
