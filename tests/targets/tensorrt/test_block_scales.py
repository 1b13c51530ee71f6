"""Scales of NVFP4 blocks taken apart: the E4M3 numbers and the float32 that calibration multiplied."""

import ml_dtypes
import numpy as np
import pytest

from calibration.rtn import quantize_rows
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from targets.tensorrt.block_scales import take_apart

EVERY = np.arange(1, 127, dtype=np.uint8)  # all positive finite E4M3 numbers
NUMBERS = EVERY.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def everything_used(scales):
    return np.ones(scales.shape, bool)


@pytest.mark.parametrize("matrix", [1.0, 3.7e-5, 1.2345e-3, 2.0**-40, 17.3])
def test_products_come_apart_again(matrix):
    scales = (NUMBERS * np.float32(matrix)).reshape(6, 21)
    found = take_apart(scales, everything_used(scales), [6])
    again = found.stored.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * found.matrix
    assert np.abs(again / scales - 1).max() < 1e-6
    assert found.factors is None


@pytest.mark.parametrize("top", EVERY[EVERY >= 8])
def test_whatever_the_largest_number_is(top):
    """Every fraction of a largest number, and subnormal ones under it."""
    numbers = NUMBERS[: np.searchsorted(EVERY, top) + 1][None]
    scales = numbers * np.float32(0.00123)
    found = take_apart(scales, everything_used(scales), [1])
    again = found.stored.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * found.matrix
    assert np.abs(again / scales - 1).max() < 1e-6


def test_stacked_tensors_may_have_matrix_scales_of_their_own():
    scales = np.concatenate([NUMBERS.reshape(6, 21) * np.float32(0.01), NUMBERS.reshape(6, 21) * np.float32(0.003)])
    found = take_apart(scales, everything_used(scales), [6, 6])
    assert found.factors is not None and found.factors.shape == (12,)
    again = found.stored.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * found.matrix * found.factors[:, None]
    assert np.abs(again / scales - 1).max() < 1e-6


def test_calibrated_rows_come_apart():
    values = np.random.default_rng(0).standard_t(4, (64, 128)).astype(np.float32)
    rows = quantize_rows(values, Precision("nvfp4", 16), float(np.abs(values).max()))
    found = take_apart(rows.scales, everything_used(rows.scales), [64])
    assert found.matrix == pytest.approx(np.abs(values).max() / (6 * 448), rel=1e-6)


def test_blocks_of_zeros_say_nothing():
    scales = np.array([[448.0, 1.2345678]], np.float32)
    with pytest.raises(UnsupportedError, match="E4M3 multiples"):
        take_apart(scales, everything_used(scales), [1])
    assert take_apart(scales, np.array([[True, False]]), [1]).stored.tolist() == [[126, 0]]
    assert take_apart(scales, np.zeros((1, 2), bool), [1]).matrix == 1.0
