"""SmoothQuant: the difficulty of activations moved into the weights (Xiao et al. 2022, arXiv:2211.10438).

s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) (equation 4): the input is divided by s, the weights' columns multiplied.
The paper takes one alpha for a model; here each input gets the one of least output error, with weights and
activations rounded as the precision says, on a sample of the calibration text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.algorithms.errors_of_outputs import representative_rows
from calibration.algorithms.rounded_activations import round_activations
from calibration.rtn import quantize_rows
from calibration.statistics import InputStatistics
from exporter.core.recipe import Precision

ALPHAS = tuple(step / 20 for step in range(21))


@dataclass(frozen=True)
class SmoothScale:
    """scale [K] float32 for the weights' columns; alpha: None where no scale at all was best; losses: without any
    scale, then one for each of ALPHAS (squared errors of the sample's outputs); empty where alpha was given."""

    scale: np.ndarray
    alpha: float | None
    losses: tuple[float, ...]


def search_scale(
    weights: Sequence[np.ndarray], statistics: InputStatistics, precision: Precision, alpha: float | None = None
) -> SmoothScale:
    """The scale of an input that several matrices [N, K] share; a given alpha is used as it is."""
    largest = np.max([np.abs(values).max(axis=0) for values in weights], axis=0)
    if alpha is not None:
        return SmoothScale(_scale(statistics.amax, largest, alpha), alpha, ())
    assert statistics.sample is not None
    rows = representative_rows(weights, statistics.sample.size)
    scales = [np.ones_like(statistics.amax), *(_scale(statistics.amax, largest, each) for each in ALPHAS)]
    losses = tuple(_loss(rows, scale, statistics, precision) for scale in scales)
    best = int(np.argmin(losses))
    return SmoothScale(scales[best], ALPHAS[best - 1] if best else None, losses)


def _scale(input_amax: np.ndarray, weight_amax: np.ndarray, alpha: float) -> np.ndarray:
    """Equation 4; 1 for channels whose input or weights are always 0."""
    alive = (input_amax > 0) & (weight_amax > 0)
    scale = np.ones(input_amax.shape, np.float32)
    powers = input_amax[alive].astype(np.float64) ** alpha / weight_amax[alive].astype(np.float64) ** (1 - alpha)
    scale[alive] = np.clip(powers, 1e-5, 1e5)
    return scale


def _loss(rows: Sequence[np.ndarray], scale: np.ndarray, statistics: InputStatistics, precision: Precision) -> float:
    assert statistics.sample is not None
    inputs = round_activations(statistics.sample / scale, precision.activations, (statistics.amax / scale).max())
    total = 0.0
    for values in rows:
        if len(values):
            rounded = quantize_rows(values * scale, precision.weight_only).dequantize()
            difference = inputs @ rounded.T - statistics.sample @ values.T
            total += float(np.einsum("tn,tn->", difference, difference, dtype=np.float64))
    return total
