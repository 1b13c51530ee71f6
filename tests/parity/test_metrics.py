"""The streamed metrics against torch's own, and how they treat NaN and Inf."""

import math

import numpy as np
import pytest
import torch

from exporter.parity.metrics import LogitComparison, relative_l2_error

# float64 on both sides.
EXACT = 1e-12


def compare(x: np.ndarray, y: np.ndarray, targets: np.ndarray, step: int) -> LogitComparison:
    comparison = LogitComparison(targets)
    for start in range(0, x.shape[1], step):
        comparison.update(x[:, start : start + step], y[:, start : start + step])
    return comparison


@pytest.mark.parametrize("step", [1, 7, 64, 333])
def test_equals_torch(step: int) -> None:
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(9, 333)) * 8).astype(np.float32)
    y = (x + generator.normal(size=x.shape)).astype(np.float32)
    targets = generator.integers(0, 333, 9)
    targets[4] = -1
    metrics = compare(x, y, targets, step).result()

    p, q = (torch.log_softmax(torch.from_numpy(z).double(), -1) for z in (x, y))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    known = torch.from_numpy(targets) >= 0
    losses = [torch.nn.functional.nll_loss(z[known], torch.from_numpy(targets)[known]).item() for z in (p, q)]
    assert metrics.kl_divergence_mean == pytest.approx(kl.mean().item(), abs=EXACT)
    assert metrics.kl_divergence_max == pytest.approx(kl.max().item(), abs=EXACT)
    assert metrics.perplexity_reference == pytest.approx(math.exp(losses[0]), rel=EXACT)
    assert metrics.perplexity == pytest.approx(math.exp(losses[1]), rel=EXACT)
    assert metrics.top1_agreement == (x.argmax(1) == y.argmax(1)).mean()
    wide = x.astype(np.float64)
    assert metrics.relative_l2_error == pytest.approx(np.linalg.norm(y - wide) / np.linalg.norm(wide), rel=EXACT)


def test_equal_logits_have_no_divergence() -> None:
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 100
    metrics = compare(x, x, np.array([1, 2, 3]), 8).result()
    assert metrics.kl_divergence_max < EXACT
    assert metrics.perplexity_ratio == 1.0
    assert (metrics.relative_l2_error, metrics.top1_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_is_infinitely_wrong(bad: float, side: int) -> None:
    pair = [np.ones((2, 10), np.float32), np.ones((2, 10), np.float32)]
    pair[side][1, 3] = bad
    metrics = compare(*pair, np.array([0, 1]), 4).result()
    assert math.isinf(metrics.relative_l2_error)
    assert math.isinf(metrics.kl_divergence_max)
    assert not math.isfinite(metrics.perplexity_ratio)
    assert math.isinf(relative_l2_error(*pair))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        relative_l2_error(np.ones((2, 3)), np.ones((3, 2)))


def test_zero_reference() -> None:
    assert relative_l2_error(np.zeros(3), np.zeros(3)) == 0.0
    assert math.isinf(relative_l2_error(np.zeros(3), np.ones(3)))
