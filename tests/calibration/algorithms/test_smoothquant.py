"""SmoothQuant's scale against equation 4 in float64, and its search against errors computed one by one."""

import ml_dtypes
import numpy as np
import pytest

from calibration.algorithms import smoothquant
from calibration.algorithms.rounded_activations import round_activations
from calibration.rtn import quantize_rows
from exporter.core.recipe import ACTIVATIONS, CHANNEL, Precision
from tests.calibration.algorithms.correlated import correlated_inputs, statistics_of, weights
from tests.calibration.algorithms.test_awq import outliers

W8A8 = Precision("int8", CHANNEL, activations="int8/token")

# NVFP4 scales blocks of 16 by themselves: smoothing is refused there (calibration.recipe_rules).
SMOOTHED = tuple(each for each in ACTIVATIONS if each != "nvfp4/tensor")


def naive_rounding(inputs: np.ndarray, activations: str) -> np.ndarray:
    out = np.empty(inputs.shape, np.float32)
    for at, token in enumerate(inputs):
        amax = np.abs(token if activations.endswith("token") else inputs).max()
        scale = np.float32(amax) / np.float32(127 if activations.startswith("int8") else 448)
        codes = token / scale
        rounded = np.rint(codes) if activations.startswith("int8") else codes.astype(ml_dtypes.float8_e4m3fn)
        out[at] = rounded.astype(np.float32) * scale
    return out


@pytest.mark.parametrize("activations", SMOOTHED)
def test_rounded_activations(activations: str) -> None:
    inputs = correlated_inputs(32, 20)
    found = round_activations(inputs, activations, float(np.abs(inputs).max()))
    np.testing.assert_array_equal(found, naive_rounding(inputs, activations))


def test_tokens_of_zeros_stay_zero_and_nothing_asked_changes_nothing() -> None:
    inputs = correlated_inputs(32, 20)
    inputs[3] = 0
    assert not round_activations(inputs, "int8/token", 1.0)[3].any()
    assert round_activations(inputs, "", 1.0) is inputs


def test_a_larger_input_than_calibration_saw_saturates() -> None:
    found = round_activations(np.array([[2.0, -2.0]], np.float32), "int8/tensor", 1.0)
    np.testing.assert_allclose(found, [[1.0, -128 / 127]], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_equation_4(alpha: float) -> None:
    inputs, values = outliers()
    found = smoothquant.search_scale([values[:10], values[10:]], statistics_of(inputs), W8A8, alpha)
    expected = np.abs(inputs.astype(np.float64)).max(0) ** alpha / np.abs(values.astype(np.float64)).max(0) ** (
        1 - alpha
    )
    np.testing.assert_allclose(found.scale, expected, rtol=1e-5)
    assert found.alpha == alpha and not found.losses


@pytest.mark.parametrize("activations", SMOOTHED)
def test_the_search_takes_the_least_output_error(activations: str) -> None:
    inputs, values = outliers()
    kind = "int8" if activations.startswith("int8") else "fp8"
    precision = Precision(kind, CHANNEL, activations=activations)
    seen = statistics_of(inputs)
    found = smoothquant.search_scale([values], seen, precision)
    for alpha, loss in zip((None, *smoothquant.ALPHAS), found.losses, strict=True):
        scale = np.ones(len(seen.amax), np.float32)
        if alpha is not None:
            scale = smoothquant.search_scale([values], seen, precision, alpha).scale
        rounded = quantize_rows(values * scale, precision.weight_only).dequantize()
        outputs = naive_rounding(inputs / scale, activations).astype(np.float64) @ rounded.T.astype(np.float64)
        expected = ((outputs - inputs.astype(np.float64) @ values.T.astype(np.float64)) ** 2).sum()
        assert loss == pytest.approx(expected, rel=1e-2)  # float32 outputs, of which small differences are taken
        if alpha == found.alpha:
            assert loss == min(found.losses)


def test_outliers_no_longer_drown_the_others() -> None:
    inputs, values = outliers()
    found = smoothquant.search_scale([values], statistics_of(inputs), W8A8)
    assert found.alpha is not None
    assert min(found.losses) < 0.1 * found.losses[0]


def test_dead_channels_keep_a_scale_of_one() -> None:
    inputs, values = correlated_inputs(128, 64), weights(40, 128)
    inputs[:, 5] = 0
    values[:, 9] = 0
    found = smoothquant.search_scale([values], statistics_of(inputs), W8A8, 0.5)
    assert found.scale[5] == found.scale[9] == 1
    assert np.isfinite(found.scale).all() and (found.scale > 0).all()
