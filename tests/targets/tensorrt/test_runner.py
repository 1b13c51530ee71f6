"""How rows become steps, against a plain simulation of what steps do to a cache; and what the runner refuses."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.core.errors import ArtifactError, InputError
from targets.base import Limits, RunOptions
from targets.tensorrt.executor import StepResult
from targets.tensorrt.runner import TensorRtRunner, check_index
from targets.tensorrt.step_plan import Step, plan_steps, plan_whole
from tests.targets.tensorrt.contract_engines import CACHE_LENGTH, LIMITS, LONGEST, contract_engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, tmp_path_factory):
    return contract_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engine"))


class CacheSimulation:
    """Executor that stores token ids and positions; logits of a row tell what it could see at its last position."""

    def __init__(self, batch: int, cache_length: int = CACHE_LENGTH, longest: int = LONGEST) -> None:
        self.ids = np.full((batch, cache_length), -1)
        self.cache_length, self.longest = cache_length, longest
        self.steps: list[tuple[int, str]] = []
        self.closed = 0

    def step(self, step: Step, profile: str) -> StepResult:
        assert step.ids.shape == step.positions.shape and step.width <= self.longest
        assert (step.write_indices + step.width <= self.cache_length).all()
        assert (step.positions >= 0).all() and (step.positions < self.cache_length).all()
        self.steps.append((step.width, profile))
        batch = np.arange(len(self.ids))
        for column in range(step.width):
            self.ids[batch, step.write_indices + column] = step.ids[:, column]
        assert (step.last_rows >= 0).all() and (step.last_rows < step.width).all()
        last = step.positions[batch, step.last_rows]
        logits = np.stack([seen(self.ids[row, : last[row] + 1]) for row in batch])
        return StepResult(logits if step.ended.any() else None)

    def close(self) -> None:
        self.closed += 1


def seen(ids: np.ndarray) -> np.ndarray:
    """float32 [V], told by every id and their order."""
    return np.random.default_rng([int(i) + 1 for i in ids]).standard_normal(320).astype(np.float32)


def opened(engine, batch: int, longest: int = LONGEST) -> tuple[TensorRtRunner, CacheSimulation]:
    prefill = replace(engine.index.profile("prefill"), sequence=(1, 1, longest))
    index = replace(engine.index, profiles=(engine.index.profile("decode"), prefill))
    simulation = CacheSimulation(batch, longest=longest)
    return TensorRtRunner(simulation, index, engine.checkpoint.config, LIMITS, RunOptions(1, batch)), simulation


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_gives_rows_what_they_would_see_alone(engine, seed):
    """Random prefills, extensions, decodes and cuts of three rows, up to the limit."""
    rng = np.random.default_rng(seed)
    runner, _ = opened(engine, 3, int(rng.choice([1, 3, 16, 40])))
    rows: list[list[int]] = [[], [], []]
    for _ in range(40):
        call = rng.choice(["prefill", "extend", "decode", "truncate"], p=[0.1, 0.35, 0.35, 0.2])
        if call == "truncate":
            row = int(rng.integers(3))
            keep = int(rng.integers(len(rows[row]) + 1))
            runner.truncate(row, keep)
            del rows[row][keep:]
            continue
        held = np.array([0 if call == "prefill" else len(row) for row in rows])
        most = 1 if call == "decode" else int(rng.integers(1, LIMITS.max_seq_len + 1))
        valid = np.minimum(rng.integers(0, most + 1, 3), LIMITS.max_seq_len - held)
        ids = rng.integers(0, 320, (3, max(1, most)))
        if call == "decode":
            logits = runner.decode(ids[:, 0], valid.astype(bool))
        else:
            logits = (runner.prefill if call == "prefill" else runner.extend)(ids, valid)
        rows = [(row[: held[b]] + ids[b, : valid[b]].tolist()) for b, row in enumerate(rows)]
        np.testing.assert_array_equal(runner.lengths, [len(row) for row in rows])
        for b in np.flatnonzero(valid):
            np.testing.assert_array_equal(logits[b], seen(np.array(rows[b])))


def test_steps_of_one_token_use_the_decoding_profile(engine):
    runner, simulation = opened(engine, 2)
    runner.prefill(np.ones((2, 33), np.int64), np.array([33, 2]))
    runner.decode(np.ones(2, np.int64), np.ones(2, bool))
    assert simulation.steps == [(16, "prefill"), (16, "prefill"), (1, "decode"), (1, "decode")]


def test_a_nearly_full_row_narrows_the_steps_of_others():
    """39 of 48 positions held: 9 at once beside it, all the same."""
    ids, valid = np.ones((2, 20), np.int64), np.array([0, 20])
    steps = list(plan_steps(ids, valid, np.array([39, 0]), 48, 16))
    assert [step.width for step in steps] == [9, 9, 2]
    assert [step.ended.tolist() for step in steps] == [[False, False], [False, False], [False, True]]
    for step in steps:
        assert (step.positions[0] == 38).all() and step.write_indices[0] == 39
    np.testing.assert_array_equal(np.concatenate([step.positions[1] for step in steps]), np.arange(20))


def test_padding_repeats_the_last_valid_position():
    (step,) = plan_steps(np.arange(12).reshape(2, 6), np.array([6, 2]), np.array([3, 4]), 48, 16)
    np.testing.assert_array_equal(step.positions, [[3, 4, 5, 6, 7, 8], [4, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(step.last_rows, [5, 1])
    assert step.feeds.keys() == {"input_ids", "position_ids", "write_indices", "last_rows"}
    assert all(array.dtype == np.int64 for array in step.feeds.values())


def test_nothing_to_do_is_no_step(engine):
    runner, simulation = opened(engine, 2)
    logits = runner.extend(np.ones((2, 3), np.int64), np.array([0, 0]))
    assert logits.shape == (2, 320) and not simulation.steps


def test_a_whole_prompt_is_one_step_of_valid_positions():
    step = plan_whole(np.ones((3, 9), np.int64), np.array([7, 0, 3]))
    assert step.width == 7 and step.positions[0].tolist() == list(range(7))
    assert step.last_rows.tolist() == [6, 0, 2] and step.ended.tolist() == [True, False, True]


def test_closing_closes_the_executor_once(engine):
    runner, simulation = opened(engine, 1)
    with runner:
        pass
    runner.close()
    assert simulation.closed == 1
    with pytest.raises(InputError, match="closed"):
        runner.prefill(np.ones((1, 1), np.int64), np.array([1]))


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_size", 128, "hidden_size 128"),
        ("num_layers", 3, "num_layers 3"),
        ("vocab_size", 10, "vocab_size 10"),
        ("cache_length", 40, "a cache of 40 positions"),
    ],
)
def test_an_index_of_another_engine_is_refused(engine, field, value, told):
    index = replace(engine.index, **{field: value})
    with pytest.raises(ArtifactError, match=told):
        check_index(index, engine.checkpoint.config, LIMITS)


def test_more_rows_than_the_profiles_have_are_refused(engine):
    with pytest.raises(ArtifactError, match="up to 3 rows"):
        check_index(engine.index, engine.checkpoint.config, Limits(4, 40))
