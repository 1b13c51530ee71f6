"""Scales found under a metric against plain ones, error by error in float64."""

import numpy as np
import pytest
import torch

from calibration.algorithms.grid import Grid, weighted_grid
from calibration.algorithms.scale_search import search_asymmetric, search_symmetric
from calibration.rtn import quantize_rows
from exporter.core.recipe import CHANNEL, Precision
from tests.calibration.algorithms.correlated import weights

GROUPS, ROWS, SIZE = 3, 20, 32
STEPS = (7.0, 7.5, 8.0, 9.0)


def groups_and_weights() -> tuple[np.ndarray, np.ndarray]:
    """[G, n, g] and one positive weight a channel [G, 1, g]."""
    loudness = np.exp(1.5 * np.random.default_rng(3).standard_normal((GROUPS, 1, SIZE))).astype(np.float32)
    return weights(GROUPS * ROWS, SIZE).reshape(GROUPS, ROWS, SIZE), loudness


def error(
    values: np.ndarray, loudness: np.ndarray, scale: np.ndarray, zero: np.ndarray | float, low: int
) -> np.ndarray:
    """Weighted squared error [G, n] of rounding to nearest."""
    scale = scale[..., None].astype(np.float64)
    codes = np.clip(np.rint(values / scale + zero), low, low + 15)
    return (loudness * (values - (codes - zero) * scale) ** 2).sum(axis=-1)


def test_symmetric_scales_beat_every_plain_step_in_every_group() -> None:
    values, loudness = groups_and_weights()
    heavy = torch.from_numpy(loudness)
    found = search_symmetric(torch.from_numpy(values), Precision("int4", SIZE), lambda q: q * heavy, STEPS).numpy()
    unit = -np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]
    ours = error(values, loudness, found, 0.0, -8)
    for step in STEPS:
        assert (ours <= error(values, loudness, unit / step, 0.0, -8) * (1 + 1e-5)).all()
    # The weights matter: without them another scale would win.
    plain = search_symmetric(torch.from_numpy(values), Precision("int4", SIZE), lambda q: q, STEPS).numpy()
    assert ours.sum() < 0.95 * error(values, loudness, plain, 0.0, -8).sum()


def test_asymmetric_scales_beat_the_plain_range_in_every_group() -> None:
    values, loudness = groups_and_weights()
    values += 0.03
    heavy, precision = torch.from_numpy(loudness), Precision("int4", SIZE, symmetric=False)
    found, zero = search_asymmetric(torch.from_numpy(values), precision, lambda q: q * heavy, STEPS)
    assert zero.min() >= 0 and zero.max() <= 15 and torch.equal(zero, zero.round())
    low, high = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    plain = (high - low) / 15
    ours = error(values, loudness, found.numpy(), zero.numpy()[..., None], 0)
    assert (ours <= error(values, loudness, plain, np.rint(-low / plain)[..., None], 0) * (1 + 1e-5)).all()


def test_a_fitted_scale_is_the_least_squares_solution() -> None:
    """One weight decides: with levels fixed, s = sum(d q w) / sum(d q q)."""
    values = np.array([[[1.0, 0.5, 0.26, -0.13]]], np.float32)
    heavy = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    found = float(search_symmetric(torch.from_numpy(values), Precision("int4", 16), lambda q: q * heavy, (8.0,)))
    levels = np.array([-8, -4, -2, 1], np.float64)
    d = np.array([1.0, 2.0, 3.0, 4.0])
    assert found == pytest.approx((d * levels * values[0, 0]).sum() / (d * levels * levels).sum(), rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_get_a_usable_scale(symmetric: bool) -> None:
    grid = weighted_grid(np.zeros((2, 64), np.float32), Precision("int4", 32, symmetric), np.ones(64, np.float32))
    assert (grid.scales == 1).all()
    assert not grid.round(np.zeros((2, 64), np.float32)).dequantize().any()


@pytest.mark.parametrize(
    "precision",
    [
        Precision("int4", 32),
        Precision("int4", 16, symmetric=False),
        Precision("int8", CHANNEL),
        Precision("nf4", 32),
        Precision("nvfp4", 16),
        Precision("mxfp4", 32),
        Precision("fp8", CHANNEL),
    ],
    ids=Precision.describe,
)
def test_a_grid_rounds_to_the_nearest_value_there_is(precision: Precision) -> None:
    values = weights(10, 64)
    grid = Grid.nearest(values, precision)
    found, nearest = grid.round(values).dequantize(), quantize_rows(values, precision).dequantize()
    assert (np.abs(found - values) <= np.abs(nearest - values) * (1 + 1e-6) + 1e-9).all()
