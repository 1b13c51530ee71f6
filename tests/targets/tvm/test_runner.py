"""The runner: ragged batches as one list of tokens, chunks, prefixes, limits, hidden states, what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import targets
from exporter.core.errors import ArtifactError, InputError
from tests.targets.engines import LIMITS, eager, eager_logits, random_ids, relative_l2
from tests.targets.tvm.runners import open_runner, with_index

# The same float32 sums in another order (other rows, chunks, threads): rounding only.
ROUNDING = 1e-5
ALL = np.array([True, True, True])
ENGINES = [("fp32", "fp32"), ("int4", "fp16"), ("int8", "int8")]
engines = pytest.mark.parametrize(("recipe", "kv_cache"), ENGINES, ids="/".join)


def prompt_logits(engine, ids: np.ndarray) -> np.ndarray:
    """Logits [V] after one prompt on its own, on one thread."""
    with open_runner(engine, threads=1) as runner:
        return runner.prefill(ids[None], np.array([len(ids)]))[0]


@engines
def test_a_ragged_batch_equals_its_rows_alone(tvm_engine, recipe, kv_cache):
    built = tvm_engine("gqa", recipe, kv_cache)
    ids, lengths = random_ids(built.config, 3, 12), np.array([12, 1, 7])
    with open_runner(built, batch=3) as runner:
        logits = runner.prefill(ids, lengths)
        np.testing.assert_array_equal(runner.lengths, lengths)
        for row, length in enumerate(lengths):
            assert relative_l2(logits[row], prompt_logits(built, ids[row, :length])) <= ROUNDING


@engines
@pytest.mark.parametrize("chunk", [1, 8])
def test_chunks_equal_one_prefill(tvm_engine, tmp_path, recipe, kv_cache, chunk):
    built = tvm_engine("gqa", recipe, kv_cache)
    ids, lengths = random_ids(built.config, 3, 33), np.array([33, 5, 30])
    with open_runner(built, batch=3) as runner:
        whole = runner.prefill(ids, lengths)
    with open_runner(with_index(built, tmp_path, chunk=chunk), batch=3) as runner:
        assert relative_l2(runner.prefill(ids, lengths), whole) <= ROUNDING
        np.testing.assert_array_equal(runner.lengths, lengths)
        runner.prefill(ids[:, :4], np.array([4, 4, 0]))
        rest = np.zeros((3, 30), np.int64)
        for row, done in enumerate((4, 4, 0)):
            rest[row, : lengths[row] - done] = ids[row, done : lengths[row]]
        assert relative_l2(runner.extend(rest, lengths - [4, 4, 0]), whole) <= ROUNDING


@engines
def test_resting_rows_are_unharmed(tvm_engine, recipe, kv_cache):
    """Rows that rest while another decodes, one of them full to the limit, continue as if nothing had happened."""
    built = tvm_engine("gqa", recipe, kv_cache)
    limit = LIMITS.max_seq_len
    ids = random_ids(built.config, 3, limit)
    with open_runner(built, batch=3) as runner:
        runner.prefill(ids, np.array([limit, 9, 4]))
        for step in range(5):
            runner.decode(ids[:, step], np.array([False, False, True]))
        np.testing.assert_array_equal(runner.lengths, [limit, 9, 9])
        after = runner.decode(ids[:, 9], np.array([False, True, False]))[1]
        assert relative_l2(after, prompt_logits(built, ids[1, :10])) <= ROUNDING
        runner.truncate(0, limit - 1)
        last = runner.decode(ids[:, limit - 1], np.array([True, False, False]))[0]
        assert relative_l2(last, prompt_logits(built, ids[0])) <= ROUNDING


@engines
def test_truncated_rows_continue_from_their_prefix(tvm_engine, recipe, kv_cache):
    built = tvm_engine("gqa", recipe, kv_cache)
    ids, others = random_ids(built.config, 2, 20), random_ids(built.config, 2, 20, seed=1)
    with open_runner(built, batch=2) as runner:
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


def test_empty_steps_change_nothing(tvm_engine):
    built = tvm_engine()
    ids = random_ids(built.config, 3, 6)
    with open_runner(built, batch=3) as runner:
        logits = runner.prefill(ids, np.array([0, 6, 0]))
        assert relative_l2(logits[1], prompt_logits(built, ids[1])) <= ROUNDING
        runner.extend(np.zeros((3, 0), np.int64), np.zeros(3, np.int64))
        runner.decode(ids[:, 0], ~ALL)
        np.testing.assert_array_equal(runner.lengths, [0, 6, 0])
        runner.prefill(ids, np.zeros(3, np.int64))
        np.testing.assert_array_equal(runner.lengths, [0, 0, 0])


@pytest.mark.parametrize("shape", ["gqa", "llama3_rope"])
def test_positions_up_to_the_limit(tvm_engine, shape):
    """Decoding to the last position that the engine was built for equals one eager pass at every step."""
    built = tvm_engine(shape)
    ids = random_ids(built.config, LIMITS.max_seq_len)
    want = eager_logits(eager(built.source), ids)
    with open_runner(built) as runner:
        runner.prefill(ids[None, :2], np.array([2]))
        for position in range(2, LIMITS.max_seq_len):
            logits = runner.decode(ids[position : position + 1], np.array([True]))
            assert relative_l2(logits[0], want[position]) <= 2e-5
        with pytest.raises(InputError) as error:
            runner.decode(ids[:1], np.array([True]))
        assert error.value.kind == "run.too_long"


@pytest.mark.parametrize(("batch", "chunk"), [(1, 512), (2, 512), (2, 4)])
def test_hidden_states_are_the_residual_stream(tvm_engine, tmp_path, batch, chunk):
    built = with_index(tvm_engine("mqa_three_layers"), tmp_path, chunk=chunk)
    ids, lengths = random_ids(built.config, batch, 10), np.array([10, 7])[:batch]
    model = eager(built.source)
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    model.model.norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with open_runner(built, batch=batch, hidden_states=True) as runner:
        logits = runner.prefill(ids, lengths)
        assert len(runner.hidden) == 4
        for row, length in enumerate(lengths):
            entering.clear()
            want_logits = eager_logits(model, ids[row, :length])
            assert relative_l2(logits[row], want_logits[-1]) <= ROUNDING
            for got, want in zip(runner.hidden, entering, strict=True):
                assert got.shape == (batch, 10, built.config.hidden_size)
                assert relative_l2(got[row, :length], want[0].numpy()) <= ROUNDING
                assert not got[row, length:].any()


def test_bad_inputs_change_nothing(tvm_engine):
    built = tvm_engine()
    good = random_ids(built.config, 3, 5)
    with open_runner(built, batch=3) as runner:
        runner.prefill(good, np.array([5, 5, 4]))
        for ids, lengths, kind in (
            (np.zeros((2, 4), np.int64), np.ones(2, np.int64), "run.shape"),
            (np.full((3, 4), built.config.vocab_size), np.full(3, 4), "run.token_id"),
            (np.zeros((3, 50), np.int64), np.array([4, 41, 4]), "run.too_long"),
        ):
            for call in (runner.prefill, runner.extend):
                with pytest.raises(InputError) as error:
                    call(ids, lengths)
                assert error.value.kind == kind
        with pytest.raises(InputError):
            runner.decode(np.zeros(2, np.int64), ALL)
        with pytest.raises(InputError):
            runner.truncate(0, 6)
        np.testing.assert_array_equal(runner.lengths, [5, 5, 4])
        logits = runner.extend(good, np.array([1, 1, 1]))
        assert relative_l2(logits[0], prompt_logits(built, np.append(good[0], good[0, 0]))) <= ROUNDING


def test_options_beyond_the_engine_are_refused(tvm_engine):
    built = tvm_engine()
    for options in ({"batch": 4}, {"batch": 0}, {"max_seq_len": 41}, {"max_seq_len": 0}):
        with pytest.raises(InputError):
            open_runner(built, **options)
    with open_runner(built, max_seq_len=8) as runner, pytest.raises(InputError):
        runner.prefill(random_ids(built.config, 1, 9), np.array([9]))


def test_a_closed_runner_says_so(tvm_engine):
    with open_runner(tvm_engine()) as runner:
        pass
    with pytest.raises(InputError) as error:
        runner.prefill(np.zeros((1, 2), np.int64), np.array([2]))
    assert error.value.kind == "run.closed"


def test_logits_of_a_step_are_the_callers_own(tvm_engine):
    built = tvm_engine()
    ids = random_ids(built.config, 1, 4)
    with open_runner(built) as runner:
        first = runner.prefill(ids, np.array([4]))
        kept = first.copy()
        runner.decode(ids[:, 0], np.array([True]))
        np.testing.assert_array_equal(first, kept)


def test_files_of_another_model_are_refused(tvm_engine, tmp_path):
    built = with_index(tvm_engine(), tmp_path, vocab_size=999)
    with pytest.raises(ArtifactError) as error:
        open_runner(built)
    assert error.value.kind == "tvm.index"


def test_an_engine_rebuilt_in_its_place_is_the_new_one(tvm_engine, tmp_path):
    """The loader must not keep the library that was at this path before."""
    first, second = tvm_engine("gqa"), tvm_engine("mqa_three_layers")
    ids = random_ids(first.config, 1, 6)
    open_runner(with_index(first, tmp_path)).close()
    for name in ("engine.so", "weights.bin", "engine.json"):
        (tmp_path / name).unlink()
    with open_runner(with_index(second, tmp_path)) as runner:
        logits = runner.prefill(ids, np.array([6]))[0]
    assert relative_l2(logits, prompt_logits(second, ids[0])) <= ROUNDING


def test_running_imports_neither_torch_nor_tvm(tvm_engine):
    """A process that loads and runs an engine; torch and tvm are installed and stay unloaded."""
    built = tvm_engine("gqa", "int4", "fp16")
    script = f"""
import json, sys
from pathlib import Path
import numpy as np
from exporter.core.config import parse_config
from targets.base import Limits, RunOptions
from targets.registry import get_target
config = parse_config(json.loads(Path({str(built.source.checkpoint.path / "config.json")!r}).read_text()))
with get_target("tvm").runner(Path({str(built.path)!r}), config, Limits(1, 40), RunOptions()) as runner:
    token = runner.prefill(np.array([[1, 2, 3]]), np.array([3])).argmax()
heavy = {{"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "tvm", "onnxruntime"}} & set(sys.modules)
print(json.dumps([int(token), sorted(heavy)]))
"""
    root = Path(targets.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [int(prompt_logits(built, np.array([1, 2, 3])).argmax()), []]
