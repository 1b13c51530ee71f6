"""Polygraphy's comparison of an engine's graph with its simulation: right graphs pass, planted faults do not."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.core.checkpoint import Checkpoint
from exporter.parity.inputs import ParityPlan, inputs_from_tokens
from exporter.parity.polygraphy_check import polygraphy_checks
from exporter.parity.polygraphy_feeds import polygraphy_cases
from exporter.parity.reference import EagerModel
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.file_names import MODEL
from tests.targets.tensorrt.contract_engines import LIMITS, contract_engine

pytest.importorskip("polygraphy")

# The contract's limit for arithmetic in half precision beside a float32 simulation.
LIMIT = 1e-2
# The graph's weights are rounded to bfloat16's 8 bits, the checkpoint's too; two layers of rounded sums on top.
BF16_LIMIT = 4e-2


def inputs(checkpoint: Checkpoint):
    tokens = np.random.default_rng(0).integers(2, checkpoint.config.vocab_size, 400)
    return inputs_from_tokens(tokens, [0], checkpoint.config.vocab_size, LIMITS.max_seq_len, ParityPlan())


def checks(engine, limit: float = LIMIT, kv_cache: str = "fp16"):
    simulation = EagerModel(engine.checkpoint, kv_cache=kv_cache)
    index = EngineIndex.read(engine.folder)
    return polygraphy_checks(engine.folder / MODEL, simulation, inputs(engine.checkpoint), index, limit, 1)


@pytest.mark.parametrize("shape", ["gqa", "tied", "mqa_three_layers", "biases"])
def test_a_faithful_graph_passes(tiny_checkpoint, tmp_path, capfd, shape):
    logits, cache = checks(contract_engine(tiny_checkpoint(shape), tmp_path))
    assert logits.name == "polygraphy_relative_l2_error" and logits.passed and 0 < logits.value < LIMIT
    assert cache.name == "polygraphy_relative_l2_error_cache" and cache.passed and 0 < cache.value < LIMIT
    assert "3 calls of model.onnx" in logits.note
    assert capfd.readouterr().out == ""


def test_a_bf16_graph_passes_its_own_limit(tiny_checkpoint, tmp_path):
    logits, cache = checks(contract_engine(tiny_checkpoint("gqa"), tmp_path, "bf16"), BF16_LIMIT, "bf16")
    assert logits.passed and cache.passed
    assert "bfloat16 computed in float32 and rounded" in logits.note


def change(folder: Path, kind: str, attribute: str, value: float) -> None:
    proto = onnx.load(str(folder / MODEL), load_external_data=False)
    node = [node for node in proto.graph.node if node.op_type == kind][-1]
    kept = [each for each in node.attribute if each.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    onnx.save(proto, str(folder / MODEL))


@pytest.mark.parametrize(
    ("kind", "attribute", "value"),
    [("RMSNormalization", "epsilon", 0.5), ("RotaryEmbedding", "interleaved", 1), ("Attention", "scale", 1.0)],
)
def test_a_fault_in_one_operator_is_seen(tiny_checkpoint, tmp_path, kind, attribute, value):
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path)
    change(engine.folder, kind, attribute, value)
    found = checks(engine)
    assert not all(check.passed for check in found), [check.value for check in found]


def test_a_mask_that_sees_one_position_too_many_is_seen(tiny_checkpoint, tmp_path):
    """The fault that causal attention with cache lengths makes: position i sees i + 1."""
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path)
    proto = onnx.load(str(engine.folder / MODEL), load_external_data=False)
    for node in proto.graph.node:
        if node.name == "mask":
            node.input[0] = "columns.less"
    one = onnx.helper.make_tensor("one.more", onnx.TensorProto.INT64, [], [1])
    proto.graph.initializer.append(one)
    proto.graph.node.insert(0, onnx.helper.make_node("Sub", ["columns", "one.more"], ["columns.less"], name="less"))
    onnx.save(proto, str(engine.folder / MODEL))
    assert not checks(engine)[0].passed


def test_cases_are_a_prompt_a_step_and_a_ragged_batch(tiny_checkpoint, tmp_path):
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path)
    prompt, step, ragged = polygraphy_cases(
        EagerModel(engine.checkpoint, kv_cache="fp16"), inputs(engine.checkpoint), engine.index
    )
    assert prompt.feeds["input_ids"].shape == (1, 15) and not prompt.feeds["past_key_values.0.key"].any()
    assert step.feeds["input_ids"].shape == (1, 1) and step.feeds["write_indices"].tolist() == [15]
    filled = step.feeds["past_key_values.1.value"][0]
    assert filled[:, :15].all() and not filled[:, 15:].any()
    assert ragged.feeds["input_ids"].shape[0] == 3 and len(set(ragged.feeds["last_rows"].tolist())) > 1
    assert not prompt.is_fed(step.feeds) and step.is_fed(dict(step.feeds))


def test_a_classifier_is_compared_without_caches(tiny_checkpoint, tmp_path):
    """Its simulation is of all the vocabulary here; the labels' columns are picked from it."""
    labels = (7, 12, 300)
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path, labels=labels)

    class LabelColumns(EagerModel):
        def logits(self, hidden: np.ndarray) -> np.ndarray:
            return super().logits(hidden)[:, list(labels)]

    simulation = LabelColumns(engine.checkpoint)
    (logits,) = polygraphy_checks(
        engine.folder / MODEL, simulation, inputs(engine.checkpoint), engine.index, LIMIT, threads=1
    )
    assert logits.passed and "2 calls" in logits.note


def test_without_polygraphy_it_is_not_run(tiny_checkpoint, tmp_path, monkeypatch):
    engine = contract_engine(tiny_checkpoint("gqa"), tmp_path)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    (check,) = checks(engine)
    assert check.value is None and check.verdict is None and "pip install polygraphy" in check.note
