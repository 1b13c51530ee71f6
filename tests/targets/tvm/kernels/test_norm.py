import numpy as np
import pytest

from tests.targets.tvm.kernels.native import aligned, compiled, every_profile

pytest.importorskip("tvm")
from targets.tvm.isa import Isa
from targets.tvm.kernels.norm import norm

EPS = 1e-5


def reference(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + EPS) * gamma


@every_profile
@pytest.mark.parametrize("width", [1, 24, 64, 75, 333])
def test_rows_are_normalized(isa: Isa, width: int) -> None:
    random = np.random.default_rng(width)
    run = compiled(norm(isa, "norm", width, EPS), isa)
    gamma = aligned(random.normal(size=width).astype(np.float32))
    for tokens in (1, 2, 3, 7):
        x = aligned(random.normal(0, 3, (tokens, width)).astype(np.float32))
        y = aligned(np.full((tokens + 1, width), np.nan, np.float32))
        run(x, gamma, y[:tokens])
        # A mean of squares in float32, a root, a division and two products: 4 roundings of 6e-8 and the mean's.
        np.testing.assert_allclose(y[:tokens], reference(x, gamma), rtol=6e-7)
        assert np.isnan(y[tokens]).all()


@every_profile
def test_only_the_rows_asked_for(isa: Isa) -> None:
    random = np.random.default_rng(0)
    x, gamma = (aligned(random.normal(size=shape).astype(np.float32)) for shape in ((9, 40), (40,)))
    rows = aligned(np.array([8, 0, 3, 3], np.int32))
    y = aligned(np.empty((4, 40), np.float32))
    compiled(norm(isa, "norm", 40, EPS, gather=True), isa)(x, rows, gamma, y)
    np.testing.assert_allclose(y, reference(x, gamma)[rows], rtol=6e-7)


@every_profile
def test_rows_of_zeros_stay_zero(isa: Isa) -> None:
    x, gamma, y = (aligned(np.full(shape, value, np.float32)) for shape, value in (((2, 32), 0), (32, 2), ((2, 32), 1)))
    compiled(norm(isa, "norm", 32, EPS), isa)(x, gamma, y)
    np.testing.assert_array_equal(y, 0)
