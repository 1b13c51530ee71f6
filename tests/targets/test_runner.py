"""The runner: cache, batches, chunks, limits, bad inputs, hidden states."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.core.errors import ArtifactError, InputError
from targets.onnxruntime import runner as runner_module
from tests.targets.engines import LIMITS, eager, eager_logits, random_ids, relative_l2

# The same float32 sums in another order (a batch, chunks, one step more): rounding only.
ROUNDING = 1e-5
ALL = np.array([True, True, True])
ENGINES = ["fp32", "int4"]


def prompt_logits(engine, ids: np.ndarray) -> np.ndarray:
    """Logits [V] after one prompt on its own."""
    with engine.runner() as runner:
        return runner.prefill(ids[None], np.array([len(ids)]))[0]


@pytest.mark.parametrize("recipe", ENGINES)
def test_a_ragged_batch_equals_its_rows_alone(engine, recipe):
    built = engine("gqa", recipe)
    ids, lengths = random_ids(built.config, 3, 12), np.array([12, 1, 7])
    with built.runner(batch=3) as runner:
        logits = runner.prefill(ids, lengths)
        np.testing.assert_array_equal(runner.lengths, lengths)
        for row, length in enumerate(lengths):
            assert relative_l2(logits[row], prompt_logits(built, ids[row, :length])) <= ROUNDING


@pytest.mark.parametrize("recipe", ENGINES)
def test_chunks_equal_one_prefill(engine, recipe, monkeypatch):
    built = engine("gqa", recipe)
    ids, lengths = random_ids(built.config, 3, 33), np.array([33, 5, 30])
    with built.runner(batch=3) as runner:
        whole = runner.prefill(ids, lengths)
        monkeypatch.setattr(runner_module, "CHUNK", 8)
        chunked = runner.prefill(ids, lengths)
        np.testing.assert_array_equal(runner.lengths, lengths)
        assert relative_l2(chunked, whole) <= ROUNDING
        runner.prefill(ids[:, :4], np.array([4, 4, 0]))
        rest = np.zeros((3, 30), np.int64)
        for row, done in enumerate((4, 4, 0)):
            rest[row, : lengths[row] - done] = ids[row, done : lengths[row]]
        assert relative_l2(runner.extend(rest, lengths - [4, 4, 0]), whole) <= ROUNDING


@pytest.mark.parametrize("head_dim", [16, 20])
def test_resting_rows_are_unharmed(engine, head_dim):
    """Rows that rest while another decodes, one of them full to the limit, continue as if nothing had happened."""
    built = engine("gqa", "fp32", head_dim=head_dim)
    limit = LIMITS.max_seq_len
    ids, lengths = random_ids(built.config, 3, limit), np.array([limit, 9, 4])
    with built.runner(batch=3) as runner:
        runner.prefill(ids, lengths)
        for step in range(5):
            runner.decode(ids[:, step], np.array([False, False, True]))
        np.testing.assert_array_equal(runner.lengths, [limit, 9, 9])
        after = runner.decode(ids[:, 9], np.array([False, True, False]))[1]
        assert relative_l2(after, prompt_logits(built, ids[1, :10])) <= ROUNDING
        runner.truncate(0, limit - 1)
        last = runner.decode(ids[:, limit - 1], np.array([True, False, False]))[0]
        assert relative_l2(last, prompt_logits(built, ids[0])) <= ROUNDING


def test_truncated_rows_continue_from_their_prefix(engine):
    built = engine("tied", "int4")
    ids, others = random_ids(built.config, 2, 20), random_ids(built.config, 2, 20, seed=1)
    with built.runner(batch=2) as runner:
        runner.prefill(ids, np.array([20, 15]))
        runner.truncate(0, 6)
        runner.truncate(1, 0)
        logits = runner.extend(others, np.array([8, 3]))
        np.testing.assert_array_equal(runner.lengths, [14, 3])
        spliced = np.concatenate([ids[0, :6], others[0, :8]])
        assert relative_l2(logits[0], prompt_logits(built, spliced)) <= ROUNDING
        assert relative_l2(logits[1], prompt_logits(built, others[1, :3])) <= ROUNDING
        runner.reset()
        np.testing.assert_array_equal(runner.lengths, [0, 0])
        again = runner.prefill(ids, np.array([20, 15]))
        assert relative_l2(again[1], prompt_logits(built, ids[1, :15])) <= ROUNDING


def test_empty_rows_stay_empty(engine):
    built = engine()
    ids = random_ids(built.config, 3, 6)
    with built.runner(batch=3) as runner:
        logits = runner.prefill(ids, np.array([0, 6, 0]))
        np.testing.assert_array_equal(runner.lengths, [0, 6, 0])
        assert relative_l2(logits[1], prompt_logits(built, ids[1])) <= ROUNDING
        runner.extend(np.zeros((3, 0), np.int64), np.zeros(3, np.int64))
        logits = runner.extend(ids, np.array([6, 0, 2]))
        assert relative_l2(logits[0], prompt_logits(built, ids[0])) <= ROUNDING
        assert relative_l2(logits[2], prompt_logits(built, ids[2, :2])) <= ROUNDING
        runner.prefill(ids, np.zeros(3, np.int64))
        np.testing.assert_array_equal(runner.lengths, [0, 0, 0])


@pytest.mark.parametrize("shape", ["gqa", "llama3_rope"])
def test_positions_up_to_the_limit(engine, shape):
    """Decoding to the last position that the engine was built for equals one eager pass at every step."""
    built = engine(shape)
    ids = random_ids(built.config, LIMITS.max_seq_len)
    want = eager_logits(eager(built.source), ids)
    with built.runner() as runner:
        runner.prefill(ids[None, :2], np.array([2]))
        for position in range(2, LIMITS.max_seq_len):
            logits = runner.decode(ids[position : position + 1], np.array([True]))
            assert relative_l2(logits[0], want[position]) <= 2e-5
        with pytest.raises(InputError) as error:
            runner.decode(ids[:1], np.array([True]))
        assert error.value.kind == "run.too_long"
        assert "41" in error.value.message and "40" in error.value.message


@pytest.mark.parametrize(("batch", "chunk"), [(1, 256), (2, 256), (2, 4)])
def test_hidden_states_are_the_residual_stream(engine, monkeypatch, batch, chunk):
    monkeypatch.setattr(runner_module, "CHUNK", chunk)
    built = engine("mqa_three_layers")
    ids, lengths = random_ids(built.config, batch, 10), np.array([10, 7])[:batch]
    model = eager(built.source)
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model.model.norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with built.runner(batch=batch, hidden_states=True) as runner:
        runner.prefill(ids, lengths)
        assert len(runner.hidden) == 4
        for row, length in enumerate(lengths):
            entering.clear()
            eager_logits(model, ids[row])
            for got, want in zip(runner.hidden, entering, strict=True):
                assert got.shape == (batch, 10, built.config.hidden_size)
                assert relative_l2(got[row, :length], want[0, :length].numpy()) <= ROUNDING
                assert not got[row, length:].any()


@pytest.mark.parametrize(
    ("kind", "ids", "lengths"),
    [
        ("run.shape", np.zeros((2, 4), np.int64), np.ones(3, np.int64)),
        ("run.shape", np.zeros(3, np.int64), np.ones(3, np.int64)),
        ("run.shape", np.zeros((3, 4)), np.ones(3, np.int64)),
        ("run.shape", np.zeros((3, 4), np.int64), np.ones(2, np.int64)),
        ("run.shape", np.zeros((3, 4), np.int64), np.ones(3)),
        ("run.lengths", np.zeros((3, 4), np.int64), np.array([1, 5, 1])),
        ("run.lengths", np.zeros((3, 4), np.int64), np.array([1, -1, 1])),
        ("run.token_id", np.full((3, 4), 320), np.array([4, 4, 4])),
        ("run.token_id", np.full((3, 4), -1), np.array([4, 4, 4])),
        ("run.too_long", np.zeros((3, 50), np.int64), np.array([4, 41, 4])),
    ],
)
def test_bad_inputs_change_nothing(engine, kind, ids, lengths):
    built = engine()
    good = random_ids(built.config, 3, 5)
    with built.runner(batch=3) as runner:
        runner.prefill(good, np.array([5, 5, 4]))
        for call in (runner.prefill, runner.extend):
            with pytest.raises(InputError) as error:
                call(ids, lengths)
            assert error.value.kind == kind
        np.testing.assert_array_equal(runner.lengths, [5, 5, 4])
        logits = runner.extend(good, np.array([1, 1, 1]))
        assert relative_l2(logits[0], prompt_logits(built, np.append(good[0], good[0, 0]))) <= ROUNDING


def test_padding_may_hold_any_id(engine):
    built = engine()
    ids = random_ids(built.config, 2, 6)
    padded = ids.copy()
    padded[1, 3:] = -100
    with built.runner(batch=2) as runner:
        want = runner.prefill(ids, np.array([6, 3]))
        np.testing.assert_array_equal(runner.prefill(padded, np.array([6, 3])), want)


@pytest.mark.parametrize("ids", [np.zeros((3, 1), np.int64), np.zeros(2, np.int64), np.full(3, 999)])
def test_bad_decodes_are_refused(engine, ids):
    with engine().runner(batch=3) as runner:
        with pytest.raises(InputError):
            runner.decode(ids, ALL)
        with pytest.raises(InputError):
            runner.decode(np.zeros(3, np.int64), np.ones(3, np.int64))


@pytest.mark.parametrize(("row", "length"), [(0, 6), (0, -1), (3, 0), (-1, 0)])
def test_bad_truncations_are_refused(engine, row, length):
    built = engine()
    with built.runner(batch=3) as runner:
        runner.prefill(random_ids(built.config, 3, 5), np.full(3, 5))
        with pytest.raises(InputError) as error:
            runner.truncate(row, length)
        assert error.value.kind == "run.truncate"


def test_options_beyond_the_engine_are_refused(engine):
    built = engine()
    for options in ({"batch": 4}, {"batch": 0}, {"max_seq_len": 41}, {"max_seq_len": 0}):
        with pytest.raises(InputError):
            built.runner(**options)
    with built.runner(max_seq_len=8) as runner, pytest.raises(InputError):
        runner.prefill(random_ids(built.config, 1, 9), np.array([9]))


def test_a_closed_runner_says_so(engine):
    built = engine()
    with built.runner() as runner:
        pass
    with pytest.raises(InputError) as error:
        runner.prefill(np.zeros((1, 2), np.int64), np.array([2]))
    assert error.value.kind == "run.closed"


def test_an_engine_that_does_not_load_is_an_artifact_error(engine, tmp_path):
    built = engine()
    (tmp_path / "model.onnx").write_bytes((built.path / "model.onnx").read_bytes())
    with pytest.raises(ArtifactError) as error:
        type(built)(tmp_path, built.source, built.result).runner()
    assert error.value.kind == "onnxruntime.load"


def test_running_imports_neither_torch_nor_onnx(engine):
    """A process that loads and runs an engine, with the packages of a build made impossible to import."""
    built = engine("gqa", "int4")
    script = f"""
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"):
    sys.modules[name] = None
import json
from pathlib import Path
import numpy as np
from exporter.core.config import parse_config
from targets.base import Limits, RunOptions
from targets.registry import get_target
config = parse_config(json.loads(Path({str(built.source.checkpoint.path / "config.json")!r}).read_text()))
options = RunOptions(threads=1)
with get_target("onnxruntime").runner(Path({str(built.path)!r}), config, Limits(1, 40), options) as runner:
    print(runner.prefill(np.array([[1, 2, 3]]), np.array([3])).argmax())
"""
    root = Path(runner_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == prompt_logits(built, np.array([1, 2, 3])).argmax()
