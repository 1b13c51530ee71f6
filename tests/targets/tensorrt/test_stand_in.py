"""The engine's graph on the CPU: against transformers, and every way through its cache against every other."""

import numpy as np
import onnx
import pytest
import torch

from exporter.core.errors import ArtifactError, InputError, UnsupportedError
from targets.tensorrt import cpu_session
from tests.support.eager_steps import load_eager
from tests.targets.engines import random_ids, relative_l2
from tests.targets.tensorrt.contract_engines import LIMITS, ContractEngine, contract_engine

# Half-precision products of two random layers against float32 ones: 11 bits, and 8.
AGAINST_EAGER = {"fp16": 5e-3, "bf16": 4e-2}
# One engine on another way: the same half-precision values but for sums in another order, each rounded again.
CONSISTENT = {"fp16": 2e-3, "bf16": 1e-2}
ARITHMETICS = ["fp16", "bf16"]


@pytest.fixture(scope="module")
def engines(tiny_checkpoint, tmp_path_factory):
    made = {}

    def factory(shape: str = "gqa", arithmetic: str = "fp16", labels: tuple[int, ...] = ()) -> ContractEngine:
        key = (shape, arithmetic, labels)
        if key not in made:
            made[key] = contract_engine(tiny_checkpoint(shape), tmp_path_factory.mktemp("engine"), arithmetic, labels)
        return made[key]

    return factory


def eager_logits(engine: ContractEngine, ids: np.ndarray) -> np.ndarray:
    """[V] after ids [S], by transformers."""
    model = load_eager(engine.checkpoint.path)
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", ["gqa", "tied", "biases", "mqa_three_layers", "llama3_rope", "odd_vocabulary"])
def test_prefill_and_decode_are_the_model(engines, shape, arithmetic):
    engine = engines(shape, arithmetic)
    ids = random_ids(engine.checkpoint.config, 1, 22)[0]
    with engine.stand_in() as runner:
        first = runner.prefill(ids[None, :20], np.array([20]))[0]
        second = runner.decode(ids[20:21], np.array([True]))[0]
        assert relative_l2(first, eager_logits(engine, ids[:20])) < AGAINST_EAGER[arithmetic]
        assert relative_l2(second, eager_logits(engine, ids[:21])) < AGAINST_EAGER[arithmetic]
        np.testing.assert_array_equal(runner.lengths, [21])


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_ragged_rows_are_what_they_are_alone(engines, arithmetic):
    engine = engines(arithmetic=arithmetic)
    ids, lengths = random_ids(engine.checkpoint.config, 3, 38), np.array([37, 1, 30])
    with engine.stand_in(batch=3) as together, engine.stand_in() as alone:
        both = (together.prefill(ids, lengths), together.decode(ids[np.arange(3), lengths], np.ones(3, bool)))
        for step, logits in enumerate(both):
            for row, length in enumerate(lengths + step):
                expected = alone.prefill(ids[row : row + 1, :length], np.array([length]))[0]
                assert relative_l2(logits[row], expected) < CONSISTENT[arithmetic]


def test_resting_rows_are_unharmed_even_at_the_limit(engines):
    """A row full to the limit leaves other rows little room to write in at once, and loses nothing."""
    engine = engines()
    limit = LIMITS.max_seq_len
    ids, lengths = random_ids(engine.checkpoint.config, 3, limit), np.array([limit, 9, 0])
    with engine.stand_in(batch=3) as runner, engine.stand_in() as alone:
        runner.prefill(ids, lengths)
        rest = runner.extend(ids, np.array([0, 0, 30]))[2]
        np.testing.assert_array_equal(runner.lengths, [limit, 9, 30])
        assert relative_l2(rest, alone.prefill(ids[2:, :30], np.array([30]))[0]) < CONSISTENT["fp16"]
        runner.truncate(0, limit - 1)
        last = runner.decode(ids[:, limit - 1], np.array([True, False, False]))[0]
        assert relative_l2(last, alone.prefill(ids[:1], np.array([limit]))[0]) < CONSISTENT["fp16"]
        after = runner.decode(ids[:, 9], np.array([False, True, False]))[1]
        assert relative_l2(after, alone.prefill(ids[1:2, :10], np.array([10]))[0]) < CONSISTENT["fp16"]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_hidden_states_are_eagers(engines, arithmetic):
    engine = engines(arithmetic=arithmetic)
    ids, lengths = random_ids(engine.checkpoint.config, 2, 20), np.array([20, 6])
    model = load_eager(engine.checkpoint.path)
    with engine.stand_in(batch=2, hidden=True) as runner, engine.stand_in(batch=2) as plain:
        np.testing.assert_allclose(runner.prefill(ids, lengths), plain.prefill(ids, lengths), rtol=0.05, atol=0.05)
        for row, length in enumerate(lengths):
            recorded: list[np.ndarray] = []
            modules = [model.model.embed_tokens, *model.model.layers]
            hooks = [m.register_forward_hook(lambda _m, _i, out, r=recorded: r.append(out.numpy()[0])) for m in modules]
            with torch.no_grad():
                model(torch.from_numpy(ids[row : row + 1, :length]))
            for hook in hooks:
                hook.remove()
            assert len(runner.hidden) == len(recorded) == engine.checkpoint.config.num_layers + 1
            for ours, theirs in zip(runner.hidden, recorded, strict=True):
                assert relative_l2(ours[row, :length], theirs) < AGAINST_EAGER[arithmetic]
                assert not ours[row, length:].any()


def test_what_was_rewritten_is_said(engines):
    with engines().stand_in() as runner:
        assert runner.changes == () and runner.proof == "the engine's graph on the CPU"
    with engines(arithmetic="bf16").stand_in() as runner:
        assert "bfloat16 computed in float32 and rounded" in runner.proof


def test_a_classifier_takes_prompts_whole(engines):
    labels = (7, 300, 12)
    engine = engines(labels=labels)
    ids, lengths = random_ids(engine.checkpoint.config, 2, 33), np.array([33, 5])
    with engine.stand_in(batch=2) as runner:
        logits = runner.prefill(ids, lengths)
        assert logits.shape == (2, 3)
        for row, length in enumerate(lengths):
            expected = eager_logits(engine, ids[row, :length])[list(labels)]
            assert relative_l2(logits[row], expected) < AGAINST_EAGER["fp16"]
        with pytest.raises(UnsupportedError, match="keeps no cache"):
            runner.decode(ids[:, 0], np.ones(2, bool))


def test_bad_steps_change_nothing(engines):
    engine = engines()
    with engine.stand_in() as runner:
        with pytest.raises(InputError, match="limit is 40"):
            runner.prefill(np.zeros((1, 41), np.int64), np.array([41]))
        with pytest.raises(InputError, match="vocabulary"):
            runner.prefill(np.full((1, 2), 10**6), np.array([2]))
        np.testing.assert_array_equal(runner.lengths, [0])
    with pytest.raises(InputError, match="closed"):
        runner.prefill(np.zeros((1, 2), np.int64), np.array([2]))


def test_a_graph_without_the_named_values_is_refused(engines, tmp_path):

    engine = engines()
    proto = onnx.load(str(engine.folder / "model.onnx"))
    for node in proto.graph.node:
        node.input[:] = [name.replace("layers.1.hidden", "other") for name in node.input]
        node.output[:] = [name.replace("layers.1.hidden", "other") for name in node.output]
    onnx.save(proto, str(tmp_path / "model.onnx"))
    engine.index.write(tmp_path)
    with pytest.raises(ArtifactError, match=r"no value layers\.1\.hidden"):
        ContractEngine(tmp_path, engine.checkpoint).stand_in(hidden=True)
    ContractEngine(tmp_path, engine.checkpoint).stand_in().close()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_large_models_are_decoded_in_every_step(engines, arithmetic, monkeypatch):
    """The same numbers, whether matrices are decoded once or each time."""
    engine = engines(arithmetic=arithmetic)
    ids = random_ids(engine.checkpoint.config, 1, 20)
    found = []
    for limit in (cpu_session.DECODED_ONCE, 0):
        monkeypatch.setattr(cpu_session, "DECODED_ONCE", limit)
        with engine.stand_in() as runner:
            found.append(runner.prefill(ids, np.array([20])))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(("arithmetic", "width"), [("fp16", 2), ("bf16", 4)])
def test_what_decoded_weights_take(engines, arithmetic, width):
    engine = engines(arithmetic=arithmetic)
    proto = onnx.load(str(engine.folder / "model.onnx"), load_external_data=False)
    weights = engine.checkpoint.config.parameter_count
    assert width * weights <= cpu_session.decoded_bytes(proto) < width * weights * 1.1
