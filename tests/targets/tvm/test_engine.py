"""Whole engines, step by step, against the eager model with the very weights they store."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.core.errors import InputError
from exporter.core.machine import cpu_features
from exporter.core.recipe import CHANNEL, TENSOR, Override, Precision, Recipe
from exporter.parity.activations import round_activations
from targets.tvm.activations import activation_rounding
from targets.tvm.devices import DEVICES, Device
from targets.tvm.file_names import INDEX, LIBRARY, WEIGHTS
from targets.tvm.formats import stored_group
from targets.tvm.isa import PROFILES
from tests.targets.engines import Engine, build_source, eager, eager_logits, precision_of, random_ids, relative_l2
from tests.targets.tvm.builds import RUNNABLE, build_tvm, tvm_source
from tests.targets.tvm.step_engine import StepEngine

# float32 on both sides, sums of at most 128 terms in another order: measured up to 2e-6.
ROUNDING = 2e-5
TOKENS = 12
VNNI = {"avx512_vnni", "avx512vl"} <= cpu_features()
FLOAT = [("biases", "fp32", {}), ("tied", "bf16", {}), ("gqa", "fp16", {"head_dim": 18})]
# Integers in every layout, biases, tables of their own and shared ones, widths that fill no vector.
INTEGER = [
    ("biases", "int8", {}),
    ("tied", "int4", {"vocab_size": 333}),
    ("tied", "int6", {"vocab_size": 333, "head_dim": 24}),
    ("llama3_rope", "int4-asym", {"head_dim": 24, "intermediate_size": 144, "hidden_size": 96}),
    ("mha", "int8-asym", {}),
    ("mqa_three_layers", "mixed", {"vocab_size": 333}),
]


def in_pieces(engine: StepEngine, ids: np.ndarray) -> np.ndarray:
    """Logits of all ids: a prompt of five, then four at once beside another row, then one by one."""
    engine.lengths[:] = 0
    first, _ = engine.step({0: ids[:5]})
    second, _ = engine.step({2: ids[:7], 0: ids[5:9]})
    rest = [engine.step({0: ids[index : index + 1], 2: ids[:1]})[0][:1] for index in range(9, len(ids))]
    return np.concatenate([first, second[7:], *rest])


def open_steps(engine: Engine) -> StepEngine:
    return StepEngine(engine.path, batch=3, capacity=40)


@pytest.mark.parametrize(("shape", "recipe", "changes"), FLOAT)
def test_float_engines_equal_eager(tvm_engine, shape, recipe, changes):
    built = tvm_engine(shape, recipe, **changes)
    ids = random_ids(built.config, TOKENS)
    want = eager_logits(eager(built.source), ids)
    steps = open_steps(built)
    assert relative_l2(steps.step({1: ids})[0], want) <= ROUNDING
    assert relative_l2(in_pieces(steps, ids), want) <= ROUNDING


def eager_with_rounded_activations(built: Engine) -> torch.nn.Module:
    """The eager model with the stored weights, whose matrices' inputs are rounded as the engine rounds them."""
    model = eager(built.source)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            precision = precision_of(built.source.recipe, name)
            if (how := activation_rounding(precision)) is not None:
                group = stored_group(precision, module.in_features)
                rounding = partial(round_activations, group=group, how=how)
                module.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]),))
    return model


def hold_to_eager_with_rounded_activations(built: Engine) -> None:
    """Most prompts agree to rounding. Where float noise pushes one activation over a rounding boundary, its code
    moves by 1/127 of the group's largest value, which a random model of this size amplifies to some 1e-2: kernels are
    held exactly by their own tests."""
    model = eager_with_rounded_activations(built)
    steps = open_steps(built)
    errors = []
    for prompt in random_ids(built.config, 9, TOKENS, seed=3):
        want = eager_logits(model, prompt)
        errors.append(max(relative_l2(in_pieces(steps, prompt)[row], want[row]) for row in (0, 1, 2)))
    assert np.median(errors) <= ROUNDING, errors
    assert max(errors) <= 0.05, errors


@pytest.mark.parametrize(("shape", "recipe", "changes"), INTEGER)
def test_integer_engines_equal_eager_with_int8_activations(tvm_engine, shape, recipe, changes):
    hold_to_eager_with_rounded_activations(tvm_engine(shape, recipe, **changes))


OVERRIDES = (
    Override("layers.0.mlp.down_proj", Precision("int8", CHANNEL, activations="int8/tensor")),
    Override("layers.1.self_attn.*", Precision("mxfp4", 32)),
    Override("layers.1.self_attn.o_proj", Precision("fp8", CHANNEL, activations="fp8/token")),
    Override("layers.1.mlp.*", Precision("nvfp4", 16)),
    Override("layers.1.mlp.down_proj", Precision("fp8", TENSOR)),
)


def test_layers_may_differ(tiny_checkpoint, tmp_path):
    """Two functions for three layers: the last one is like the second but for its weights."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")
    last = tuple(replace(each, pattern=each.pattern.replace("layers.1", "layers.2")) for each in OVERRIDES[1:])
    linear, head = Precision("int4", 32, activations="int8/token"), Precision("int6", 32, activations="int8/token")
    recipe = Recipe("mixed", linear, head, head.weight_only, overrides=(*OVERRIDES, *last))
    source = build_source(tiny_checkpoint("mqa_three_layers", tie_word_embeddings=True, gain=0.5), recipe)
    built = build_tvm(source, tmp_path)
    index = json.loads((built.path / INDEX).read_text())
    assert index["layer_functions"] == ["layer_0", "layer_1", "layer_1"]
    assert index["head"] == ["norm.weight", "embed_tokens.weight"]
    hold_to_eager_with_rounded_activations(built)


def test_tables_of_4_bits_serve_embedding_and_head(tiny_checkpoint, tmp_path):
    pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")
    nf4 = Precision("nf4", 32)
    source = build_source(tiny_checkpoint("tied", vocab_size=333, gain=0.5), Recipe("nf4", nf4, nf4, nf4))
    built = build_tvm(source, tmp_path)
    model, steps, errors = eager_with_rounded_activations(built), open_steps(built), []
    for prompt in random_ids(built.config, 9, TOKENS, seed=3):
        errors.append(relative_l2(steps.step({1: prompt[:3]})[0], eager_logits(model, prompt[:3])))
        steps.lengths[:] = 0
    # Levels of 16 bits are off by 1.6e-5 of a group's largest weight, one in five of which is the largest.
    assert np.median(errors) <= 1e-3, errors


@pytest.mark.parametrize("device", RUNNABLE)
def test_every_profile_that_runs_here_computes_the_same(tvm_engine, device):
    hold_to_eager_with_rounded_activations(tvm_engine("biases", "int4", "fp32", device))


@pytest.mark.skipif(not VNNI, reason="this CPU has no AVX-512 VNNI, whose short vectors stand in for AVX-VNNI")
def test_avx_vnni_computes_the_same(tvm_engine, monkeypatch):
    """The profile's kernels with the same products in AVX-512's encoding, where this CPU lacks AVX-VNNI's."""
    profile = PROFILES["x86-64-v3-vnni"]
    features = ("+avx512vl", "+avx512vnni")
    device = Device("stand-in", "x86_64-linux-gnu", profile, "x86-64-v3", features, "AVX-VNNI's stand-in")
    monkeypatch.setitem(DEVICES, device.name, device)
    hold_to_eager_with_rounded_activations(tvm_engine("biases", "int8", "fp32", device.name))


@pytest.mark.parametrize(("kind", "limit"), [("fp16", 2e-3), ("int8", 4e-2)])
def test_other_caches_stay_near_eager(tvm_engine, kind, limit):
    """One fp16 value is off by 2^-11, one int8 value by 1/254 of the largest: limits some ten and four times that."""
    built = tvm_engine("gqa", "fp32", kind)
    ids = random_ids(built.config, TOKENS)
    want = eager_logits(eager(built.source), ids)
    error = relative_l2(in_pieces(open_steps(built), ids), want)
    assert 1e-6 < error <= limit


def test_functions_one_by_one_equal_the_whole_step(tvm_engine):
    built = tvm_engine("mqa_three_layers", "mixed", vocab_size=333)
    ids = random_ids(built.config, TOKENS)
    steps = open_steps(built)
    whole, _ = steps.step({1: ids})
    steps.lengths[:] = 0
    parts, states = steps.step({1: ids}, by_function=True)
    assert np.array_equal(parts, whole)
    assert len(states) == 4
    model = eager(built.source)
    assert relative_l2(states[0], model.model.embed_tokens.weight.detach().numpy()[ids]) <= ROUNDING


def test_a_step_longer_than_planned_is_refused_not_computed_wrong(tvm_engine):
    steps = StepEngine(tvm_engine("biases", "fp32").path, batch=1, capacity=640)
    steps.index["max_seq_len"] = 640  # the refusal comes before any position is looked up
    with pytest.raises(Exception, match=r"(?i)alloc|check failed|storage"):
        steps.step({0: np.zeros(steps.index["chunk"] + 1, np.int64)})


def test_the_same_source_gives_the_same_bytes(tvm_engine, tmp_path):
    built = tvm_engine("tied", "int4", vocab_size=333)
    again = build_tvm(built.source, tmp_path)
    for name in (LIBRARY, WEIGHTS, INDEX):
        assert (again.path / name).read_bytes() == (built.path / name).read_bytes(), name


def test_the_library_does_not_grow_with_depth(tvm_engine):
    """Three layers against two: some bytecode for the step, no kernel."""
    sizes = [(tvm_engine("gqa", "int4", num_hidden_layers=layers).path / LIBRARY).stat().st_size for layers in (2, 5)]
    assert 0 <= sizes[1] - sizes[0] <= 3 * 4096


def test_files_and_manifest_entries(tvm_engine):
    built = tvm_engine("tied", "int4", vocab_size=333)
    assert sorted(path.name for path in built.path.iterdir()) == sorted(built.result.files)
    index = json.loads((built.path / INDEX).read_text())
    result = built.result
    assert result.weights_bytes == sum(tensor["bytes"] for tensor in index["tensors"].values())
    assert {"tvm", "tvm-ffi"} <= result.toolchain.keys()
    assert result.signature["outputs"]["logits"] == {"dtype": "float32", "shape": ["wanted", 333]}
    assert result.signature["inputs"]["1.key"]["shape"] == ["batch", 2, "blocks", 16, 32]
    assert result.requirements["cpu_features"]
    assert index["head"] == ["norm.weight", "embed_tokens.weight"]
    assert index["layer_functions"] == ["layer", "layer"]
    assert (index["cache"]["kind"], index["max_batch"], index["max_seq_len"]) == ("fp32", 3, 40)


def test_a_library_that_cannot_be_written_is_bad_output(tiny_checkpoint, tmp_path):
    source = tvm_source(tiny_checkpoint("gqa"), "int4")
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(InputError, match=WEIGHTS):
        build_tvm(source, Path(tmp_path))
