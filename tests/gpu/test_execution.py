"""A small engine on the GPU beside its own graph on the CPU: every way through the cache, graphs, memory."""

import numpy as np
import pytest

from targets.base import RunOptions
from targets.tensorrt.cuda_driver import CudaDriver
from tests.gpu.building import open_built
from tests.targets.engines import random_ids, relative_l2

pytestmark = pytest.mark.gpu

# Half precision on both sides, sums in other orders: the contract's limit between an engine and its simulation.
LIMIT = 1e-2


@pytest.fixture
def pair(engine, build, toolkit, tmp_path):
    """(on the GPU, on the CPU), three rows each."""
    ours = open_built(engine, build.device, toolkit, tmp_path, RunOptions(1, 3))
    with ours, engine.stand_in(batch=3) as theirs:
        yield ours, theirs


def test_ragged_prefill_decode_and_rest(pair, engine):
    ids, lengths = random_ids(engine.checkpoint.config, 3, 30), np.array([30, 1, 22])
    ours, theirs = (each.prefill(ids, lengths) for each in pair)
    assert relative_l2(ours, theirs) < LIMIT
    for step in range(6):
        active = np.array([True, step != 2, step > 0])
        ours, theirs = (each.decode(ids[:, step], active)[active] for each in pair)
        assert relative_l2(ours, theirs) < LIMIT, f"step {step}"
    for each in pair:
        each.truncate(0, 4)
    part = np.array([9, 0, 3])
    ours, theirs = (each.extend(ids[:, :9], part)[part > 0] for each in pair)
    assert relative_l2(ours, theirs) < LIMIT


def test_a_full_row_rests_while_others_go_on(pair, engine):
    limit = engine.limits.max_seq_len
    ids, lengths = random_ids(engine.checkpoint.config, 3, limit), np.array([limit, 9, 0])
    for each in pair:
        each.prefill(ids, lengths)
    ours, theirs = (each.extend(ids, np.array([0, 0, 30]))[2] for each in pair)
    assert relative_l2(ours, theirs) < LIMIT


def test_repeated_steps_give_the_same_bits(pair, engine):
    """A recorded step is the step: logits of one token, queued first, then replayed."""
    ids = random_ids(engine.checkpoint.config, 3, 10)
    runner, seen = pair[0], []
    for _ in range(4):
        runner.prefill(ids, np.array([9, 9, 9]))
        seen.append(runner.decode(ids[:, 9], np.ones(3, bool)))
    for again in seen[2:]:
        np.testing.assert_array_equal(again, seen[1])
    assert relative_l2(seen[0], seen[1]) < LIMIT


def test_closing_gives_the_memory_back(engine, build, toolkit, tmp_path):
    driver = CudaDriver()
    try:
        with open_built(engine, build.device, toolkit, tmp_path):
            pass
        before = driver.free_memory[0]
        for _ in range(3):
            with open_built(engine, build.device, toolkit, tmp_path) as runner:
                runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
        # What the driver keeps for itself: kernels that it loaded, local memory.
        assert before - driver.free_memory[0] < 64 << 20
    finally:
        driver.close()
