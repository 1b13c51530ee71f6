"""The benchmark of FP8: what it compares, and how it cuts text into pieces."""

import numpy as np
import pytest

from calibration.presets import preset
from exporter.core.recipe import Recipe
from tests.benchmarks.calibration_fp8 import Text, pieces, rows


def test_pieces_are_perplexity_ratios_of_whole_pieces() -> None:
    loss = np.array([0.1, 0.3, -0.2, 0.0, 9.0])
    np.testing.assert_allclose(pieces(loss, 2), np.exp([0.2, -0.1]))


def test_rows_are_told_apart_by_what_they_round() -> None:
    found = rows()
    assert len({(each.linear, each.overrides, each.algorithms, each.options) for each in found.values()}) == len(found)
    assert preset("fp8") in found.values() and preset("fp8-channel") in found.values()
    assert all(isinstance(each, Recipe) for each in found.values())


@pytest.mark.parametrize("last", [1, 3])
def test_a_position_without_a_follower_counts_for_the_divergence_alone(last: int) -> None:
    """Two models of four tokens: log p of what follows and KL, against a direct sum."""
    ids, at = np.array([0, 2, 1, 3]), np.array([0, last])
    exact, rounded = (np.random.default_rng(seed).standard_normal((4, 4)) for seed in (1, 2))
    divergence, loss = Text([ids], [at]).differences(lambda _: exact, lambda _: rounded)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (exact, rounded))
    np.testing.assert_allclose(divergence, (p * np.log(p / q)).sum(-1)[at])
    known = [i for i in at if i + 1 < len(ids)]
    np.testing.assert_allclose(loss, [np.log(p[i, ids[i + 1]] / q[i, ids[i + 1]]) for i in known])
