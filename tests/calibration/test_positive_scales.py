"""Positive scales: values kept but for the lowest code, and what that costs."""

import numpy as np
import pytest

from calibration.positive_scales import positive_scales
from calibration.rtn import absmax_rows, quantize_rows
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

RNG = np.random.default_rng(5)


def rows_of(codes: list[list[int]], scales: list[float], kind: str = "int4") -> QuantizedRows:
    precision = Precision(kind, 16)
    return QuantizedRows(np.array(codes, np.int8), np.array(scales, np.float32)[:, None], None, precision)


def test_groups_without_the_lowest_code_keep_every_value() -> None:
    codes = RNG.integers(-7, 8, (6, 16)).tolist()
    rows = rows_of(codes, [0.5, -0.5, 0.25, -2.0, -0.125, 1.0])
    found = positive_scales(rows)
    assert (found.scales > 0).all()
    np.testing.assert_array_equal(found.dequantize(), rows.dequantize())


def test_the_lowest_code_becomes_the_next_and_the_scale_fits_best() -> None:
    codes = [[-8, 3, -8, 5, *range(-6, 6)]]
    rows = rows_of(codes, [-0.5])
    found = positive_scales(rows)
    expected = np.minimum(-np.array(codes), 7)
    np.testing.assert_array_equal(found.codes, expected)
    values = rows.dequantize().astype(np.float64)
    best = (values * expected).sum() / (expected.astype(np.float64) ** 2).sum()
    assert found.scales[0, 0] == pytest.approx(best, rel=2**-11)  # rounded to float16


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_cost_is_what_the_docstring_says(group: int) -> None:
    weights = RNG.normal(size=(256, 1024)).astype(np.float32)
    rows = quantize_rows(weights, Precision("int4", group))

    def error(found: QuantizedRows) -> float:
        return float(np.square(found.dequantize() - weights, dtype=np.float64).mean())

    assert (rows.scales < 0).any()
    cost = error(positive_scales(rows)) / error(rows)
    assert 1.10 < cost < 1.19
    assert cost < 0.9 * error(absmax_rows(weights, Precision("int4", group))) / error(rows)


@pytest.mark.parametrize("precision", [Precision("int8", 32), Precision("int4", 32, False), Precision("nvfp4", 16)])
def test_rows_that_have_no_negative_scale_pass_through(precision: Precision) -> None:
    rows = quantize_rows(RNG.normal(size=(8, 64)).astype(np.float32), precision)
    assert positive_scales(rows) is rows


def test_zeros_stay_zeros() -> None:
    rows = quantize_rows(np.zeros((2, 32), np.float32), Precision("int4", 16))
    assert not positive_scales(rows).dequantize().any()
