"""Descent on codes and scales against the loss computed by brute force in float64."""

import numpy as np
import pytest
import torch

from calibration.algorithms.descent import descend
from calibration.algorithms.grid import Grid
from exporter.core.recipe import CHANNEL, Precision
from tests.calibration.algorithms.correlated import correlated_inputs, hessian_error, statistics_of, weights

WIDTH, ROWS = 512, 6


def start(precision: Precision) -> tuple[np.ndarray, np.ndarray, Grid, torch.Tensor]:
    """Weights, a Hessian, scales and levels of rounding to nearest."""
    values = weights(ROWS, WIDTH)
    hessian = statistics_of(correlated_inputs(WIDTH, 2000)).hessian
    assert hessian is not None
    grid = Grid.nearest(values, precision)
    scales = grid.scales.repeat_interleave(grid.group, 0)
    levels = torch.from_numpy(grid.round(values).dequantize().T.copy()) / scales
    return values, hessian, grid, levels.round()


@pytest.mark.parametrize("group", [16, 32, 128, 256, CHANNEL])
def test_it_ends_where_no_single_code_can_win(group: int) -> None:
    values, hessian, grid, levels = start(Precision("int4", group))
    scales = grid.scales.repeat_interleave(grid.group, 0)
    errors = torch.from_numpy(values.T.copy()) - levels * scales
    grid, levels = descend(errors, levels, grid, torch.from_numpy(hessian), torch.zeros(WIDTH), 40)
    left = values.astype(np.float64) - grid.rows(levels).dequantize()
    np.testing.assert_allclose(errors.numpy().T, left, atol=1e-6)
    gradient = left @ hessian.astype(np.float64)
    step = grid.scales.repeat_interleave(grid.group, 0).numpy().T.astype(np.float64)
    for sign in (1, -1):
        allowed = (levels.numpy().T + sign >= -8) & (levels.numpy().T + sign <= 7)
        change = -2 * sign * step * gradient + step**2 * hessian.diagonal()
        # Ties of float32: a change that would win less than a millionth of the whole loss is none.
        assert (change[allowed] > -1e-6 * hessian_error(left, hessian)).all()


@pytest.mark.parametrize("group", [32, 256, CHANNEL])
def test_scales_end_at_the_least_of_their_parabola(group: int) -> None:
    values, hessian, grid, levels = start(Precision("int4", group))
    scales = grid.scales.repeat_interleave(grid.group, 0)
    errors = torch.from_numpy(values.T.copy()) - levels * scales
    grid, levels = descend(errors, levels, grid, torch.from_numpy(hessian), torch.zeros(WIDTH), 60)
    left = values.astype(np.float64) - grid.rows(levels).dequantize()
    for at, channels in enumerate(np.split(np.arange(WIDTH), len(grid.scales))):
        codes = levels.numpy().T[:, channels].astype(np.float64)
        slope = ((left @ hessian)[:, channels] * codes).sum(axis=1)
        curvature = ((codes @ hessian[np.ix_(channels, channels)]) * codes).sum(axis=1)
        scale = np.abs(grid.scales[at].numpy())
        # Stored in float16, 2^-11 apart in proportion; codes settled last may have moved the least by as much again.
        assert (np.abs(slope / curvature) <= 2.0**-9 * scale).all()


def test_fixed_scales_stay() -> None:
    values, hessian, grid, levels = start(Precision("nvfp4", 16))
    errors = torch.from_numpy(values.T.copy()) - levels * grid.scales.repeat_interleave(16, 0)
    found, _ = descend(errors, levels, grid, torch.from_numpy(hessian), torch.zeros(WIDTH), 2)
    assert torch.equal(found.scales, grid.scales)
