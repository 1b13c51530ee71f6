"""Sampling against transformers' own logits processors and against known frequencies."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from exporter.core.errors import InputError
from exporter.runtime.sampling import Sampler, Sampling, nucleus

LOGITS = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 2


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(e / e.sum())


def test_greedy_takes_the_smallest_id_on_a_tie() -> None:
    assert Sampler(Sampling()).choose(np.array([0.0, 3.0, 3.0, 1.0], np.float32)) == 1


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p: float) -> None:
    kept = TopPLogitsWarper(top_p)(None, torch.from_numpy(LOGITS)[None])[0]
    ids, probabilities = nucleus(softmax(LOGITS), top_p)
    assert set(ids.tolist()) == set(torch.isfinite(kept).nonzero().flatten().tolist())
    assert np.all(np.diff(probabilities) <= 0) and probabilities.sum() >= top_p
    assert probabilities[:-1].sum() < top_p


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 1.0])
def test_the_nucleus_is_never_empty_even_when_all_are_equal(top_p: float) -> None:
    ids, probabilities = nucleus(np.full(8, 0.125), top_p)
    assert len(ids) == max(1, round(top_p * 8)) and np.all(probabilities == 0.125)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.7, seed=1))
    draws = np.array([sampler.choose(logits) for _ in range(20_000)])
    warped = TemperatureLogitsWarper(0.7)(None, torch.from_numpy(logits)[None])[0]
    expected = torch.softmax(warped, -1).numpy()
    # Four standard deviations of a frequency over 20000 draws are at most 0.0142.
    assert np.abs(np.bincount(draws, minlength=4) / len(draws) - expected).max() < 0.0142


def test_top_p_never_leaves_the_nucleus() -> None:
    ids, _ = nucleus(softmax(LOGITS), 0.3)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.3, seed=2))
    assert {sampler.choose(LOGITS) for _ in range(500)} <= set(ids.tolist())


def test_a_tiny_temperature_is_greedy() -> None:
    sampler = Sampler(Sampling(temperature=1e-6))
    assert {sampler.choose(LOGITS) for _ in range(20)} == {int(LOGITS.argmax())}


def test_seeds_and_rows_give_streams_of_their_own() -> None:
    def draw(seed: int, row: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), row)
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(seed, row)) for seed in range(3) for row in range(3)}) == 9


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1},
     {"top_p": float("nan")}, {"seed": -1}],
)  # fmt: skip
def test_bad_settings(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**values)  # type: ignore[arg-type]
