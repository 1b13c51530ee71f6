"""The whole pipeline: both tracers, every shape, exactly the canonical model written by hand; faults found by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.core.canonical import RotaryTable, Slice
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.core.isomorphism import difference
from exporter.core.traced import TracedModel
from exporter.passes.pipeline import fuse, passes_list
from tests.conftest import CheckpointFactory
from tests.passes.graphs import relative_l2, run_ort, run_reference
from tests.support.canonical_llama import canonical_llama
from tests.support.eager_steps import causal_mask, load_eager, run_eager, weight_feeds
from tests.support.tiny import SHAPES
from tests.support.traced import tiny_config, traced_model

TRACERS = ("torchscript", "torch-export")
LENGTH = 32
# fp32 rounding: fused and raw operators sum in different orders over widths of 64 to 128; measured 1e-7 to 4e-7.
RELATIVE_L2 = 2e-6
FIRED = {
    "fuse_rms_norm": 2,
    "fuse_rope": 2,
    "fuse_attention": 1,
    "use_static_cache": 1,
    "fuse_swish": 1,
    "pack_qkv": 1,
    "pack_gate_up": 1,
    "gather_rows": 1,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tracer", TRACERS)
def test_arrives_at_the_canonical_model(tracer: str, shape: str) -> None:
    config = tiny_config(shape)
    result = fuse(traced_model(config, tracer), config, LENGTH)
    expected = canonical_llama(config, LENGTH)
    assert result.fired == FIRED
    assert len(result.model.layers) == config.num_layers
    assert len({id(layer.structure) for layer in result.model.layers}) == 1
    for mine, theirs in zip(result.model.slices, expected.slices, strict=True):
        assert difference(mine.structure, theirs.structure) is None
        assert (mine.kind, mine.index) == (theirs.kind, theirs.index)
        assert mine.weights == theirs.weights


@pytest.mark.parametrize("tracer", TRACERS)
def test_fusing_a_full_trace_equals_fusing_a_stamped_one(tracer: str) -> None:
    config = tiny_config("mqa_three_layers")
    stamped = fuse(traced_model(config, tracer), config, LENGTH).model
    full = fuse(traced_model(config, tracer, full=True), config, LENGTH).model
    assert len({id(layer.structure) for layer in full.layers}) == 3
    for mine, theirs in zip(stamped.slices, full.slices, strict=True):
        assert difference(mine.structure, theirs.structure) is None
        assert (mine.label, mine.weights) == (theirs.label, theirs.weights)


def test_the_traced_model_is_left_as_it_is() -> None:
    config = tiny_config()
    traced, again = (traced_model(config, "torchscript") for _ in range(2))
    fuse(traced, config, LENGTH)
    for mine, theirs in zip(traced.slices, again.slices, strict=True):
        assert difference(mine.structure, theirs.structure) is None
        assert mine.weights == theirs.weights


@pytest.mark.parametrize("shape", ["gqa", "mha", "biases", "llama3_rope", "head_dim", "mqa_three_layers"])
@pytest.mark.parametrize("past", [0, 5])
def test_fused_slices_equal_the_eager_model(shape: str, past: int, tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(shape)
    eager, config = load_eager(path), ModelConfig.from_directory(path)
    model = fuse(traced_model(tiny_config(shape), "torchscript"), config, LENGTH).model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, past + 4))
    step = run_eager(eager, ids, past)
    for run in (run_ort, run_reference):
        for i, layer in enumerate(model.layers):
            feeds = static_feeds(step.hidden[i], step.past[i], past) | weight_feeds(eager, layer)
            found = run(layer.structure, feeds)
            assert relative_l2(found["hidden_out"], step.hidden[i + 1]) <= RELATIVE_L2
            for name, present in zip(("present_key", "present_value"), step.present[i], strict=True):
                assert relative_l2(found[name][:, :, : past + 4], present) <= RELATIVE_L2
        head = {"hidden": step.hidden[-1], "rows": np.array([3, 7]), **weight_feeds(eager, model.head)}
        assert relative_l2(run(model.head.structure, head)["logits"], step.logits[:, -1]) <= RELATIVE_L2


def static_feeds(hidden: np.ndarray, past: tuple[np.ndarray, np.ndarray], length: int) -> dict[str, np.ndarray]:
    batch, steps, _ = hidden.shape
    feeds = {
        "hidden": hidden,
        "position_ids": np.broadcast_to(np.arange(length, length + steps), (batch, steps)).copy(),
        "write_indices": np.full(batch, length),
        "nonpad_kv_seqlen": np.full(batch, length + steps),
    }
    for name, cache in zip(("past_key", "past_value"), past, strict=True):
        buffer = np.full((batch, cache.shape[1], LENGTH, cache.shape[3]), 1e4, np.float32)
        buffer[:, :, :length] = cache
        feeds[name] = buffer
    return feeds


@pytest.mark.parametrize("tracer", TRACERS)
def test_values_of_one_name_are_equal_before_and_after(tracer: str, tiny_checkpoint: CheckpointFactory) -> None:
    """Parity localises faults by name: what a fused graph calls as the raw one does, it must compute as well."""
    eager = load_eager(tiny_checkpoint("biases"))
    config = tiny_config("biases")
    raw = traced_model(config, tracer).layers[0]
    fused = fuse(traced_model(config, tracer), config, LENGTH).model.layers[0]
    step = run_eager(eager, np.random.default_rng(0).integers(0, 320, (2, 4)), 0)
    feeds = static_feeds(step.hidden[0], step.past[0], 0) | {"attention_mask": causal_mask(2, 4, 0)}
    raw_feeds = {**feeds, "past_key": step.past[0][0], "past_value": step.past[0][1], **weight_feeds(eager, raw)}
    names = {value.name or "" for node in raw.structure.graph for value in node.outputs}
    kept = {value.name or "": node.op_type for node in fused.structure.graph for value in node.outputs}
    shared = sorted(kept.keys() & names)
    before = run_ort(raw.structure, raw_feeds, shared)
    after = run_ort(fused.structure, {**feeds, **weight_feeds(eager, fused)}, shared)
    for name in shared:
        found = after[name][:, :, :4] if name.startswith("present") else after[name]
        assert relative_l2(found, before[name]) <= RELATIVE_L2, name
    # Every fused operator is among them.
    counted = [kept[name] for name in shared]
    assert counted.count("RMSNormalization") == counted.count("RotaryEmbedding") == 2
    assert {"Attention", "Swish", "TensorScatter", "Split"} <= set(counted)
    assert counted.count("Split") == 5


def first(traced: TracedModel, kind: str) -> ir.Node:
    return next(node for node in traced.layers[0].structure.graph if node.op_type == kind)


def other_power(traced: TracedModel) -> None:
    exponent = first(traced, "Pow").inputs[1]
    assert exponent is not None
    exponent.const_value = ir.tensor(np.array(3.0, np.float32), name=exponent.name)


def swap_rotation(traced: TracedModel) -> None:
    cosine, sine = first(traced, "Cos"), first(traced, "Sin")
    cosine.op_type, sine.op_type = "Sin", "Cos"


def other_softmax(traced: TracedModel) -> None:
    first(traced, "Softmax").attributes["axis"] = ir.AttrInt64("axis", 2)


def relu_gate(traced: TracedModel) -> None:
    first(traced, "Sigmoid").op_type = "Relu"


def doubled_query(traced: TracedModel) -> None:
    """The query projection reads a value of its own: something stands between it and the norm."""
    graph = traced.layers[0].structure.graph
    weight = next(value for value in graph.inputs if value.name == "self_attn.q_proj.weight")
    product = next(iter(next(iter(weight.uses())).node.outputs[0].uses())).node
    source = product.inputs[0]
    assert source is not None
    doubled = ir.node("Add", [source, source])
    graph.insert_before(product, doubled)
    product.replace_input_with(0, doubled.outputs[0])


FAULTS: dict[str, Callable[[TracedModel], None]] = {
    "fuse_rms_norm": other_power,
    "fuse_rope": swap_rotation,
    "fuse_attention": other_softmax,
    "fuse_swish": relu_gate,
    "pack_qkv": doubled_query,
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_missing_fusion_is_named_with_its_layers(rule: str) -> None:
    config = tiny_config("mqa_three_layers")
    traced = traced_model(config, "torchscript")
    FAULTS[rule](traced)
    with pytest.raises(BudgetError, match=rf"{rule} fired \d times instead of \d in layers 0 to 2 \(") as caught:
        fuse(traced, config, LENGTH)
    assert caught.value.kind == "fuse.missing"
    assert caught.value.exit_code == 6


def test_a_missing_fusion_in_one_layer_of_a_full_trace_names_that_layer() -> None:
    config = tiny_config("mqa_three_layers")
    traced = traced_model(config, "torchscript", full=True)
    damaged = TracedModel(traced.embedding, [traced.layers[1]], traced.head)
    relu_gate(damaged)
    with pytest.raises(BudgetError, match="fuse_swish fired 0 times instead of 1 in layer 1"):
        fuse(traced, config, LENGTH)


def test_other_frequencies_than_the_config_are_refused() -> None:
    traced = traced_model(tiny_config(), "torchscript")
    with pytest.raises(BudgetError) as caught:
        fuse(traced, tiny_config("llama3_rope"), LENGTH)
    assert caught.value.kind == "fuse.rotary"


def test_tables_come_from_the_graph_and_reach_as_far_as_the_cache() -> None:
    config = tiny_config("llama3_rope")
    layer: Slice = fuse(traced_model(config, "torchscript"), config, 77).model.layers[1]
    table = layer.weights["rotary.sin_cache"]
    assert isinstance(table, RotaryTable)
    assert (table.function, table.length, table.values().shape) == ("sin", 77, (77, 8))


def test_the_list_of_passes_tells_what_is_expected() -> None:
    listed = {step.name: step for step in passes_list()}
    assert all(step.summary for step in listed.values())
    counted = {name for name, step in listed.items() if any(n is not None for n in step.expected.values())}
    assert counted == FIRED.keys()


def test_the_documentation_lists_the_passes_in_their_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    shown = {row[1].strip(" `"): (row[3].strip(), row[4].strip()) for row in rows}
    told = {
        step.name: tuple(
            "-" if kind not in step.expected else str(step.expected[kind] or "any") for kind in ("layer", "head")
        )
        for step in passes_list()
    }
    assert list(shown.items()) == list(told.items())
