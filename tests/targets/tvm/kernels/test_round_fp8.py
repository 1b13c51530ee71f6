"""Activations rounded to E4M3, against ml_dtypes: every value between two codes, ties, subnormals, rows of zeros."""

import ml_dtypes
import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile

pytest.importorskip("tvm")
from targets.tvm.isa import Isa
from targets.tvm.kernels.round_fp8 import round_fp8


def expected(x: np.ndarray) -> np.ndarray:
    """The formula in float32, E4M3 by ml_dtypes."""
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(448), np.float32(2.0**-126))
    codes = (x * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float32) * scale


def check(isa: Isa, x: np.ndarray) -> np.ndarray:
    y = aligned(np.full((len(x) + 1, x.shape[1]), 77, np.float32))
    compiled(round_fp8(isa, "round_fp8", x.shape[1]), isa)(aligned(x), y[:-1])
    np.testing.assert_array_equal(y[:-1], expected(x))
    assert (y[-1] == 77).all()
    return y


@every_profile
@pytest.mark.parametrize("rows, width", [(1, 1), (2, 45), (5, 64), (3, 33)])
def test_rows_of_any_size(isa: Isa, rows: int, width: int) -> None:
    random = np.random.default_rng(width)
    x = random.normal(size=(rows, width)) * 10.0 ** random.integers(-30, 30, (rows, 1))
    x[rows // 2, : width // 2] = 0
    check(isa, x.astype(np.float32))


@every_profile
def test_all_codes_ties_and_their_neighbours(isa: Isa) -> None:
    """The largest of the row is 448, so that the scale is 1."""
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    near = [np.nextafter(ties, np.float32(side)) for side in (0, 1000)]
    x = np.concatenate([codes, ties, *near])
    y = check(isa, np.stack([np.append(x, 448), np.append(-x, -448)]).astype(np.float32))
    np.testing.assert_array_equal(y[0, :127], codes)


@every_profile
def test_zeros_stay_zero_and_tiny_rows_are_finite(isa: Isa) -> None:
    x = np.zeros((4, 20), np.float32)
    x[1, 3], x[2, 4], x[3, :3] = 1e-40, 2.0**-126, (3e38, -1e38, 1e30)
    y = check(isa, x)
    assert not y[0].any() and np.isfinite(y).all()
