"""Tracing: raw slices that run as they are and equal the eager model, for both tracers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.core.canonical import CheckpointWeight
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.isomorphism import difference
from exporter.core.traced import TracedModel
from exporter.trace.extract import Cut, extract
from exporter.trace.slices import stamp
from exporter.trace.trace import trace
from tests.conftest import CheckpointFactory
from tests.passes.graphs import parse, relative_l2, run_ort
from tests.support.eager_steps import EagerStep, causal_mask, load_eager, run_eager, weight_feeds
from tests.support.tiny import SHAPES
from tests.support.traced import tiny_config, traced_model

TRACERS = ("torchscript", "torch-export")
# fp32 rounding of two runtimes over one layer (widths of 64 to 128): measured 2e-7 to 5e-7.
RELATIVE_L2 = 2e-6
BATCH, STEPS = 2, 4


def slice_feeds(model, traced: TracedModel, step: EagerStep, layer: int, past: int) -> dict[str, np.ndarray]:
    return {
        "hidden": step.hidden[layer],
        "position_ids": np.broadcast_to(np.arange(past, past + STEPS), (BATCH, STEPS)).copy(),
        "attention_mask": causal_mask(BATCH, STEPS, past),
        "past_key": step.past[layer][0],
        "past_value": step.past[layer][1],
        **weight_feeds(model, traced.layers[layer]),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tracer", TRACERS)
def test_raw_slices_equal_the_eager_model(tracer: str, shape: str, tiny_checkpoint: CheckpointFactory) -> None:
    path: Path = tiny_checkpoint(shape)
    model, config = load_eager(path), ModelConfig.from_directory(path)
    traced = traced_model(tiny_config(shape), tracer)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, 5 + STEPS))
    for past in (0, 5):
        step = run_eager(model, ids[:, : past + STEPS], past)
        feeds = {"input_ids": ids[:, past : past + STEPS], **weight_feeds(model, traced.embedding)}
        errors = {"embedding": relative_l2(run_ort(traced.embedding.structure, feeds)["hidden"], step.hidden[0])}
        for i, layer in enumerate(traced.layers):
            found = run_ort(layer.structure, slice_feeds(model, traced, step, i, past))
            expected = dict(zip(found, (step.hidden[i + 1], *step.present[i]), strict=True))
            errors |= {f"{layer.label} {name}": relative_l2(found[name], expected[name]) for name in found}
        head = {"hidden": step.hidden[-1], **weight_feeds(model, traced.head)}
        errors["head"] = relative_l2(run_ort(traced.head.structure, head)["logits"], step.logits)
        assert max(errors.values()) <= RELATIVE_L2, errors


@pytest.mark.parametrize("tracer", TRACERS)
def test_the_stamped_model_equals_the_full_trace(tracer: str) -> None:
    config = tiny_config("mqa_three_layers")
    stamped, full = traced_model(config, tracer), traced_model(config, tracer, full=True)
    assert len({id(layer.structure) for layer in stamped.layers}) == 1
    assert len({id(layer.structure) for layer in full.layers}) == 3
    for mine, theirs in zip(stamped.slices, full.slices, strict=True):
        assert difference(mine.structure, theirs.structure) is None
        assert (mine.kind, mine.index, mine.weights) == (theirs.kind, theirs.index, theirs.weights)


@pytest.mark.parametrize("tracer", TRACERS)
def test_structures_hold_no_weights(tracer: str) -> None:
    config = tiny_config()
    traced = traced_model(config, tracer)
    for piece in traced.slices:
        sizes = {value.name: value.const_value.size for value in piece.structure.graph.initializers.values()}
        assert max(sizes.values(), default=0) <= config.head_dim // 2, sizes
    sources = [w.sources for piece in traced.slices for w in piece.weights.values() if isinstance(w, CheckpointWeight)]
    assert sorted(name for (name,) in sources) == sorted(config.tensor_shapes)


@pytest.mark.parametrize("shape", ["tied", "gqa"])
def test_the_head_reads_the_embedding_where_they_are_tied(shape: str) -> None:
    head = traced_model(tiny_config(shape), "torchscript").head
    source = "model.embed_tokens.weight" if shape == "tied" else "lm_head.weight"
    assert head.weights["lm_head.weight"] == CheckpointWeight((source,))


def test_a_model_of_one_layer_is_traced() -> None:
    config = tiny_config(num_hidden_layers=1)
    assert [layer.label for layer in traced_model(config, "torchscript").layers] == ["layer 0"]


@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_is_silent(tracer: str, capfd: pytest.CaptureFixture[str]) -> None:
    trace(tiny_config(), tracer)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_tracer_is_refused() -> None:
    with pytest.raises(InputError, match="jax") as caught:
        trace(tiny_config(), "jax")
    assert caught.value.kind == "usage.tracer"
    assert "torch-export, torchscript" in caught.value.remedy


def test_layers_that_differ_are_not_stamped() -> None:
    config = tiny_config()
    traced = traced_model(config, "torchscript", full=True)
    softmax = next(node for node in traced.layers[1].structure.graph if node.op_type == "Softmax")
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)
    with pytest.raises(UnsupportedError, match=r"layer 0 and layer 1 .* Softmax attributes") as caught:
        stamp(traced, config)
    assert caught.value.kind == "trace.layers"


def test_a_slice_that_reads_beyond_its_boundary_is_refused() -> None:
    model = parse("slice (float[B,S,4] ids, float[B,S,4] h) => (float[B,S,4] y) { a = Neg(ids) y = Add(a, h) }")
    ids, hidden = model.graph.inputs
    cut = Cut("layer 0", {hidden: "hidden"}, {model.graph.outputs[0]: "hidden_out"}, "model.layers.0.", {ids: "hidden"})
    with pytest.raises(UnsupportedError, match="it reads 'ids' in Neg") as caught:
        extract(model, cut)
    assert caught.value.kind == "trace.boundary"
    with pytest.raises(UnsupportedError, match="not provided: ids"):
        extract(model, Cut("layer 0", cut.inputs, cut.outputs, cut.prefix))


def test_other_weights_than_the_config_promises_are_refused() -> None:
    with_biases = traced_model(tiny_config("biases"), "torchscript").layers[0]
    config = tiny_config()
    from exporter.trace.slices import _check_weights

    with pytest.raises(UnsupportedError, match=r"q_proj\.bias") as caught:
        _check_weights(with_biases, config)
    assert caught.value.kind == "trace.weights"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"},
        {"rope_theta": 10000.0, "pretraining_tp": 1, "num_key_value_heads": None, "transformers_version": "4.31.0"},
        {"head_dim": None, "pad_token_id": -1, "use_cache": False},
        {"pad_token_id": 32000, "attention_dropout": 0.1, "_attn_implementation": "sdpa"},
    ],
    ids=["rope before version 5", "llama 2", "no head_dim, no pad", "pad beyond the vocabulary"],
)
def test_configs_of_every_age_are_traced(changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    traced = trace(config, "torchscript")
    frequencies = traced.layers[0].structure.graph.initializers["inv_freq"].const_value
    assert frequencies is not None
    expected = config.rope.inverse_frequencies(config.head_dim)
    assert np.allclose(frequencies.numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tracer", TRACERS)
def test_structures_tell_nothing_of_the_machine_that_traced_them(tracer: str) -> None:
    for piece in traced_model(tiny_config(), tracer).slices:
        written = ir.to_proto(piece.structure).SerializeToString()
        assert b".py" not in written
        assert b"site-packages" not in written


@pytest.mark.parametrize(
    "field", [{"rope_parameters": []}, {"attention_dropout": "x"}, {"use_cache": 3}, {"id2label": 5}], ids=str
)
def test_fields_that_only_transformers_reads_are_bad_input(field: dict[str, object]) -> None:
    config = tiny_config()
    with pytest.raises(InputError, match=r"config\.json: transformers refuses it") as refused:
        trace(replace(config, raw={**config.raw, **field}), "torchscript")
    assert (refused.value.kind, refused.value.exit_code) == ("checkpoint.config", 2)
