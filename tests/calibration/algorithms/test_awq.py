"""AWQ's scale and clipping against the paper's formulas in float64."""

import numpy as np
import pytest

from calibration.algorithms import awq
from calibration.rtn import absmax_rows, quantize_rows
from calibration.statistics import InputStatistics
from exporter.core.recipe import CHANNEL, Precision
from tests.calibration.algorithms.correlated import correlated_inputs, hessian_error, statistics_of, weights

WIDTH, ROWS = 128, 40
INT4 = Precision("int4", 32)


def outliers(factor: float = 64) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of which a few channels are louder by a factor, and weights whose columns are smaller by it."""
    inputs, values = correlated_inputs(WIDTH, 600), weights(ROWS, WIDTH)
    inputs[:, [3, 50, 90]] *= factor
    values[:, [3, 50, 90]] /= factor
    return inputs, values


def output_error(inputs: np.ndarray, values: np.ndarray, found: np.ndarray) -> float:
    difference = inputs.astype(np.float64) @ (found.astype(np.float64) - values).T
    return float((difference**2).sum() / len(inputs))


def test_the_losses_are_output_errors_of_the_scales_of_the_paper() -> None:
    inputs, values = outliers(8)
    found = awq.search_scale([values[:24], values[24:]], statistics_of(inputs), INT4)
    magnitude = np.abs(inputs.astype(np.float64)).mean(axis=0)
    for step, loss in enumerate(found.losses):
        scale = magnitude ** (step / 20)
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        changed = quantize_rows(values * scale, INT4).dequantize() / scale
        assert loss == pytest.approx(output_error(inputs, values, changed), rel=1e-3)
        if step == np.argmin(found.losses):
            np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
            assert found.ratio == step / 20


def test_no_scale_is_among_the_candidates() -> None:
    inputs, values = correlated_inputs(WIDTH, 600), weights(ROWS, WIDTH)
    found = awq.search_scale([values], statistics_of(inputs), INT4)
    plain = output_error(inputs, values, quantize_rows(values, INT4).dequantize())
    assert found.losses[0] == pytest.approx(plain, rel=1e-3)
    assert min(found.losses) <= found.losses[0]


def test_outlier_channels_are_protected() -> None:
    inputs, values = outliers()
    found = awq.search_scale([values], statistics_of(inputs), INT4)
    assert found.ratio > 0.5
    assert (found.scale[[3, 50, 90]] > 10 * np.median(found.scale)).all()
    without = awq.search_scale([weights(ROWS, WIDTH)], statistics_of(correlated_inputs(WIDTH, 600)), INT4)
    # What the outliers cost is mostly won back: scaling them down exactly would give `without`.
    assert min(found.losses) - without.losses[0] < 0.5 * (found.losses[0] - without.losses[0])


def test_dead_channels_and_dead_inputs_keep_a_scale_of_one() -> None:
    inputs, values = outliers()
    inputs[:, 7] = 0
    assert awq.search_scale([values], statistics_of(inputs), INT4).scale[7] == 1
    nothing = awq.search_scale([values], statistics_of(np.zeros_like(inputs)), INT4)
    np.testing.assert_array_equal(nothing.scale, np.ones(WIDTH, np.float32))


def test_statistics_of_a_scaled_input() -> None:
    inputs = correlated_inputs(WIDTH, 300)
    scale = np.exp(np.random.default_rng(1).standard_normal(WIDTH)).astype(np.float32)
    ours, expected = statistics_of(inputs).scaled(scale), statistics_of(inputs / scale)
    for name in ("amax", "mean_abs", "hessian", "sample"):
        np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 128, CHANNEL])
def test_clipping_lowers_the_error_of_each_group_alone(group: int, symmetric: bool) -> None:
    """Under the Hessian's blocks, which is what the search sees; plain rounding clips nothing."""
    inputs = correlated_inputs(WIDTH, 600)
    values, seen = weights(ROWS, WIDTH), statistics_of(inputs)
    assert seen.hessian is not None
    precision = Precision("int4", group, symmetric)
    size = precision.group_of(WIDTH)
    blocks = seen.hessian * np.kron(np.eye(WIDTH // size), np.ones((size, size)))
    clipped = awq.clipped(values, seen, precision).dequantize() - values
    for plain in (absmax_rows(values, precision), quantize_rows(values, precision)):
        assert hessian_error(clipped, blocks) < hessian_error(plain.dequantize() - values, blocks)


def test_codes_of_fixed_scales_are_rounded_to_nearest() -> None:
    values, seen = weights(ROWS, WIDTH), statistics_of(correlated_inputs(WIDTH, 100))
    for precision in (Precision("nf4", 32), Precision("nvfp4", 16), Precision("mxfp4", 32), Precision("fp8", CHANNEL)):
        np.testing.assert_array_equal(
            awq.clipped(values, seen, precision).codes, quantize_rows(values, precision).codes
        )


def test_wide_matrices_are_judged_by_some_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, values = outliers()
    seen: InputStatistics = statistics_of(inputs)
    whole = awq.search_scale([values], seen, INT4)
    monkeypatch.setattr("calibration.algorithms.errors_of_outputs.MULTIPLICATIONS", WIDTH**2 * ROWS // 4)
    some = awq.search_scale([values], seen, INT4)
    kept = awq.search_scale([values[::4].copy()], seen, INT4)
    assert some.losses == kept.losses != whole.losses
