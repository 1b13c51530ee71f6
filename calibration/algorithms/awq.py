"""AWQ: scales that protect the channels which matter, and clipping of the others (Lin et al. 2023, arXiv:2306.00978).

Weights are multiplied by s, their input divided by it (equation 4); s = mean|x|^a for the ratio a of least output error
(equation 5), over a grid of 20 as in the paper's code, which also divides s by the root of its largest times its least.
The error is exact for the calibration text: with D = Q(W s) / s - W it is tr(D H DT).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.algorithms.errors_of_outputs import output_error, representative_rows
from calibration.algorithms.grid import clipped_grid
from calibration.rtn import quantize_rows
from calibration.statistics import InputStatistics
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

STEPS = 20


@dataclass(frozen=True)
class AwqScale:
    """scale [K] float32 for the weights' columns; ratio: its exponent, 0 for none; losses: one for each ratio
    0, 1/20 ... 19/20 (mean squared output errors, summed over the rows looked at)."""

    scale: np.ndarray
    ratio: float
    losses: tuple[float, ...]


def search_scale(weights: Sequence[np.ndarray], statistics: InputStatistics, precision: Precision) -> AwqScale:
    """The scale of an input that several matrices [N, K] share; never worse than none under the loss."""
    assert statistics.hessian is not None
    rows = representative_rows(weights, len(statistics.amax) ** 2)
    ratios = [step / STEPS for step in range(STEPS)]
    scales = [_scale(statistics.mean_abs, ratio) for ratio in ratios]
    losses = tuple(_loss(rows, scale, statistics.hessian, precision.weight_only) for scale in scales)
    best = int(np.argmin(losses))
    return AwqScale(scales[best], ratios[best], losses)


def _scale(mean_abs: np.ndarray, ratio: float) -> np.ndarray:
    """mean|x|^ratio, its extremes at equal distance from 1; 1 for channels that are always 0."""
    alive = (mean_abs > 0) & np.isfinite(mean_abs)
    if not alive.any():
        return np.ones(mean_abs.shape, np.float32)
    powers = np.maximum(mean_abs[alive].astype(np.float64) ** ratio, 1e-4)
    scale = np.ones(mean_abs.shape, np.float32)
    scale[alive] = powers / np.sqrt(powers.max() * powers.min())
    return scale


def _loss(rows: Sequence[np.ndarray], scale: np.ndarray, hessian: np.ndarray, precision: Precision) -> float:
    return sum(
        output_error(quantize_rows(values * scale, precision).dequantize() / scale - values, hessian)
        for values in rows
        if len(values)
    )


def clipped(
    values: np.ndarray, statistics: InputStatistics, precision: Precision, tensor_amax: float | None = None
) -> QuantizedRows:
    """Rows [n, K] rounded to nearest with, for each group, the clipping of least error under the Hessian's block.

    Precisions whose scales are no free choice (fp8, nvfp4, mxfp4), and nf4, are rounded as calibration.rtn does.
    """
    assert statistics.hessian is not None
    if not precision.is_integer:
        return quantize_rows(values, precision, tensor_amax)
    values = np.ascontiguousarray(values, np.float32)
    return clipped_grid(values, precision.weight_only, statistics.hessian).round(values)
