"""Statistics gathered in batches against their definitions in float64 over all tokens at once."""

import numpy as np
import pytest
import torch

from calibration.accumulate import WIDE_SUMS, StatisticsAccumulator
from exporter.core.errors import InputError


def inputs(tokens: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.standard_normal((tokens, width)) * generator.lognormal(0, 2, width)).astype(np.float32)


def gather(x: np.ndarray, sizes: list[int], **wanted: object) -> StatisticsAccumulator:
    gathered = StatisticsAccumulator("layer 0: mlp_input", x.shape[1], len(x), **wanted)  # type: ignore[arg-type]
    start = 0
    for size in sizes:
        gathered.add(torch.from_numpy(x[start : start + size].reshape(1, size, -1)))
        start += size
    assert start == len(x)
    return gathered


@pytest.mark.parametrize("width", [48, 200, WIDE_SUMS + 72])
def test_all_statistics_equal_their_definitions(width: int) -> None:
    x = inputs(600, width)
    found = gather(x, [100, 250, 50, 200], hessian=True, sample=7).finish()
    wide = x.astype(np.float64)
    assert found.tokens == 600
    np.testing.assert_array_equal(found.amax, np.abs(x).max(0))
    # float32 sums of up to 250 terms in each batch.
    np.testing.assert_allclose(found.mean_abs, np.abs(wide).mean(0), rtol=1e-5)
    assert found.hessian is not None and found.hessian.dtype == np.float32
    expected = wide.T @ wide / 600
    diagonal = np.sqrt(np.diag(expected))
    # Rounded once where sums are float64; else float32 sums of 600 products, relative to the channels' magnitudes.
    tolerance = 1e-7 if width <= WIDE_SUMS else 2e-6
    assert (np.abs(found.hessian - expected) <= tolerance * np.outer(diagonal, diagonal)).all()
    np.testing.assert_array_equal(found.hessian, found.hessian.T)


def test_the_sample_is_evenly_spaced_whatever_the_batches() -> None:
    x = inputs(600, 8)
    found = gather(x, [100, 250, 50, 200], sample=6).finish().sample
    np.testing.assert_array_equal(found, x[[50, 150, 250, 350, 450, 550]])
    np.testing.assert_array_equal(gather(x, [600], sample=6).finish().sample, found)
    few = gather(x[:3], [1, 2], sample=6).finish().sample
    np.testing.assert_array_equal(few, x[:3])


def test_nothing_is_gathered_that_nobody_wants() -> None:
    found = gather(inputs(10, 4), [10]).finish()
    assert found.hessian is None and found.sample is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_layer(value: float) -> None:
    x = inputs(10, 4)
    x[7, 2] = value
    with pytest.raises(InputError, match="layer 0: mlp_input") as refusal:
        gather(x, [5, 5])
    assert refusal.value.kind == "calibrate.not_finite" and refusal.value.exit_code == 2
    assert "tokens 5 to 10" in refusal.value.message
