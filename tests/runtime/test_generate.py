"""Generation with a runner whose right answers are known."""

import numpy as np
import pytest

from exporter.core.errors import EngineSmithError, InputError
from exporter.runtime.generate import Generation, generate, generate_batch
from exporter.runtime.sampling import Sampling
from targets.base import Limits, RunOptions
from tests.runtime.fake_runner import FakeRunner, reference

VOCABULARY = 50


def runner(batch: int = 1, limit: int = 64) -> FakeRunner:
    return FakeRunner(VOCABULARY, Limits(batch, limit), RunOptions(batch=batch))


def test_greedy_matches_the_plain_loop() -> None:
    seen: list[tuple[int, int]] = []
    found = generate(runner(), [3, 1, 4], 10, on_token=lambda row, token: seen.append((row, token)), max_seq_len=64)
    expected = reference([3, 1, 4], 10, set(), VOCABULARY)
    assert found == Generation((3, 1, 4), tuple(expected), "length")
    assert seen == [(0, token) for token in expected]


def test_a_stop_token_ends_the_row_and_is_its_last_output() -> None:
    free = reference([3, 1, 4], 20, set(), VOCABULARY)
    found = generate(runner(), [3, 1, 4], 20, {free[5]}, max_seq_len=64)
    assert found.finish_reason == "stop" and list(found.output_ids) == free[: free.index(free[5]) + 1]


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    free = reference([3, 1, 4], 4, set(), VOCABULARY)
    assert generate(runner(), [3, 1, 4], 4, {free[3]}, max_seq_len=64).finish_reason == "stop"


def test_ragged_rows_equal_single_ones() -> None:
    prompts = [[1], [2, 3, 4, 5], [6, 7], [8]]
    eos = set(range(0, VOCABULARY, 7))
    together = generate_batch(runner(batch=6), prompts, 12, eos, max_seq_len=64)
    alone = [generate(runner(), prompt, 12, eos, max_seq_len=64) for prompt in prompts]
    assert together == alone
    assert len({len(row.output_ids) for row in together}) > 1, "the rows must end at different times"


@pytest.mark.parametrize(("length", "expected"), [(6, 4), (9, 1), (10, 0)])
def test_the_answer_ends_where_the_cache_does(length: int, expected: int) -> None:
    made = runner(limit=10)
    found = generate(made, list(range(length)), 100, max_seq_len=10)
    assert (len(found.output_ids), found.finish_reason) == (expected, "length")
    assert made.lengths[0] <= 10


def test_rows_that_are_full_rest_while_others_go_on() -> None:
    together = generate_batch(runner(batch=2, limit=10), [[1] * 9, [2]], 100, max_seq_len=10)
    assert [len(row.output_ids) for row in together] == [1, 9]


def test_nothing_to_do_runs_nothing() -> None:
    made = runner()
    assert generate(made, [1], 0, max_seq_len=8) == Generation((1,), (), "length")
    assert made.calls == []


@pytest.mark.parametrize(
    ("prompts", "new", "kind"),
    [
        ([[1] * 11], 1, "run.too_long"),
        ([[1], [1] * 11], 1, "run.too_long"),
        ([[]], 1, "run.empty_prompt"),
        ([[1], []], 1, "run.empty_prompt"),
        ([], 1, "run.batch"),
        ([[1]] * 3, 1, "run.batch"),
        ([[1]], -1, "usage.max_new_tokens"),
    ],
)
def test_bad_requests(prompts: list[list[int]], new: int, kind: str) -> None:
    made = runner(batch=2, limit=10)
    with pytest.raises(InputError) as caught:
        generate_batch(made, prompts, new, max_seq_len=10)
    assert caught.value.kind == kind and caught.value.exit_code == 2 and made.calls == []
    if kind == "run.too_long":
        assert "11" in caught.value.message and "10" in caught.value.message


def test_sampling_is_reproducible_and_independent_of_the_batch() -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5)
    first = generate_batch(runner(batch=2), [[1, 2], [3]], 12, sampling=sampling, max_seq_len=64)
    again = generate_batch(runner(batch=2), [[1, 2], [3]], 12, sampling=sampling, max_seq_len=64)
    alone = generate(runner(), [1, 2], 12, sampling=sampling, max_seq_len=64)
    other = generate(runner(), [1, 2], 12, sampling=Sampling(0.8, 0.9, 6), max_seq_len=64)
    assert first == again and first[0] == alone and other != alone


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_engine_is_not_believed(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    made = runner()
    monkeypatch.setattr(made, "logits", lambda tokens: np.full(VOCABULARY, bad, np.float32))
    with pytest.raises(EngineSmithError) as caught:
        generate(made, [1], 3, max_seq_len=64)
    assert caught.value.kind == "run.not_finite"
