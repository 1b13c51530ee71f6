"""Every cell of the table of precisions and caches: an engine that runs as it says, or a refusal in words."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from exporter.core.config import parse_config
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import CHANNEL, KV_CACHES, TENSOR, Override, Precision, Recipe, all_precisions
from exporter.parity.activations import round_activations
from exporter.parity.cache_values import RoundedCache
from targets.gpu_activations import refused_on_cpus
from targets.onnxruntime import matmul
from targets.onnxruntime.stored_rows import in_blocks, stored_group
from targets.onnxruntime.support import capabilities, recipe_support
from tests.support.tiny import BASE
from tests.targets.engines import (
    INPUT_SCALE,
    Engine,
    build,
    build_source,
    eager,
    eager_logits,
    precision_of,
    random_ids,
    relative_l2,
)

# float32 on both sides, sums of at most 256 terms in another order.
ROUNDING = 2e-5
# Groups of 256 fit; one layer says what the next would.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 320}
# It bears quantization as trained models do.
STEADY = {"gain": 0.5}
EVERY = {precision.describe(): precision for precision in all_precisions()}
CELLS = {name: precision for name, precision in EVERY.items() if refused_on_cpus(precision) is None}
FP32 = Precision("fp32")
BFLOAT16 = Precision("bf16")
LENGTHS = np.array([9, 4, 1])
Rounding = Callable[[Precision, torch.Tensor], torch.Tensor]


def kept(precision: Precision, x: torch.Tensor) -> torch.Tensor:
    return x


def rounded_as_asked(precision: Precision, x: torch.Tensor) -> torch.Tensor:
    """E4M3 inputs as the recipe has them; int8 ones are left to MatMulNBits."""
    how = {"fp8/token": "fp8-token", "fp8/tensor": "fp8-tensor"}.get(precision.activations)
    return x if how is None else round_activations(x, x.shape[-1], how, INPUT_SCALE)


def rounded_as_shipped(precision: Precision, x: torch.Tensor) -> torch.Tensor:
    if in_blocks(precision):
        return round_activations(x, stored_group(precision, x.shape[-1]), "group")
    return rounded_as_asked(precision, x)


def reference(engine: Engine, rounding: Rounding) -> torch.nn.Module:
    """The eager model with the stored weights, its matrices' inputs rounded."""
    model = eager(engine.source)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            precision = precision_of(engine.source.recipe, name)
            module.register_forward_pre_hook(lambda _, given, p=precision: (rounding(p, given[0]),))
    return model


def errors(engine: Engine, model: torch.nn.Module) -> list[float]:
    """Of a ragged prefill and four steps of decoding, each against one pass of the reference over the whole row."""
    ids = random_ids(engine.config, 3, 14)
    want = [eager_logits(model, row) for row in ids]
    rows, found = np.arange(3), []
    with engine.runner(batch=3) as runner:
        logits = runner.prefill(ids[:, :9], LENGTHS)
        found += [relative_l2(logits[row], want[row][runner.lengths[row] - 1]) for row in rows]
        for _ in range(4):
            logits = runner.decode(ids[rows, runner.lengths], np.array([True] * 3))
            found += [relative_l2(logits[row], want[row][runner.lengths[row] - 1]) for row in rows]
    return found


def errors_of_prompts(engine: Engine, model: torch.nn.Module) -> list[float]:
    """Of independent prompts of three tokens, the last one decoded."""
    prompts, found = random_ids(engine.config, 24, 3, seed=3), []
    with engine.runner() as runner:
        for prompt in prompts:
            runner.prefill(prompt[None, :2], np.array([2]))
            found.append(relative_l2(runner.decode(prompt[2:], np.array([True]))[0], eager_logits(model, prompt)[-1]))
    return found


def hold(engine: Engine, rounding: Rounding) -> None:
    """To rounding of float32 sums where nothing else is rounded."""
    model = reference(engine, rounding)
    if rounding is kept:
        found = errors(engine, model)
        assert max(found) <= ROUNDING, found
    else:
        hold_but_for_boundaries(errors_of_prompts(engine, model))


def hold_but_for_boundaries(found: list[float]) -> None:
    """Float noise can push a value over a boundary between codes; its code moves by one, which later layers amplify.
    Most results agree to rounding of sums, and none is far off."""
    assert np.median(found) <= ROUNDING, found
    assert max(found) <= 0.05, found


@pytest.mark.parametrize("name", CELLS)
def test_every_precision_runs_as_its_weights_say(tiny_checkpoint, tmp_path, monkeypatch, name):
    """In layers, head and embedding at once, without MatMulNBits' own rounding of activations."""
    monkeypatch.setattr(matmul, "INT8_ACTIVATIONS", 0)
    precision = CELLS[name]
    assert capabilities()[name].usable
    recipe = Recipe(name, precision, precision, precision)
    rounds = precision.activations.startswith("fp8")
    engine = build(build_source(tiny_checkpoint("gqa", **(STEADY if rounds else WIDE)), recipe), tmp_path)
    hold(engine, rounded_as_asked if rounds else kept)


@pytest.mark.parametrize("name", sorted(EVERY.keys() - CELLS.keys()))
def test_activations_of_gpus_are_refused(name):
    answer = recipe_support(parse_config({**BASE, "model_type": "llama"}), Recipe("r", EVERY[name], FP32, FP32))
    assert answer == capabilities()[name] and answer.level == "refused"
    assert EVERY[name].activations in answer.why and 'activations = ""' in answer.remedy


SHIPPED = [
    "int8/channel+int8/token",
    "int8/channel+int8/tensor",
    "int4/channel",
    "int4/g32+int8/token",
    "nvfp4",
    "mxfp4",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_activations_become_int8_in_blocks(tiny_checkpoint, tmp_path, name):
    recipe = Recipe(name, *[CELLS[name]] * 3)
    hold(build(build_source(tiny_checkpoint("gqa", **STEADY), recipe), tmp_path), rounded_as_shipped)


@pytest.mark.parametrize("name", ["nf4/g64", "fp8/tensor+fp8/tensor", "fp8/channel+fp8/token", "nvfp4", "int8/channel"])
@pytest.mark.parametrize("shape", ["biases", "tied", "odd_vocabulary", "mqa_three_layers"])
def test_coded_weights_in_other_shapes(tiny_checkpoint, tmp_path, monkeypatch, shape, name):
    """Biases, a head that shares the table's bytes, a vocabulary that no block divides, layers of one structure."""
    monkeypatch.setattr(matmul, "INT8_ACTIVATIONS", 0)
    precision = CELLS[name]
    source = build_source(
        tiny_checkpoint(shape, **STEADY), Recipe(name, precision, precision.weight_only, precision.weight_only)
    )
    hold(build(source, tmp_path), rounded_as_asked if precision.activations else kept)


@pytest.mark.parametrize("name", ["nf4/g64", "fp8/tensor"])
def test_large_matrices_are_decoded_in_parts(tiny_checkpoint, tmp_path, monkeypatch, name):
    """A head of 333 rows in six parts, most others in two or three; nothing is stored twice for that."""
    precision = CELLS[name]
    source = build_source(tiny_checkpoint("tied", vocab_size=333), Recipe(name, precision, precision, precision))
    whole = build(source, tmp_path / "whole")
    monkeypatch.setattr(matmul, "MOST_DECODED", 64 * 64)
    engine = build(source, tmp_path / "parts")
    nodes = onnx.load(str(engine.path / "model.onnx"), load_external_data=False).graph.node
    assert [len(node.input) for node in nodes if node.name == "lm_head"] == [6]
    hold(engine, kept)
    assert engine.result.weights_bytes == whole.result.weights_bytes


@pytest.mark.parametrize("precision", [Precision("fp8", CHANNEL), Precision("fp8", TENSOR)], ids=Precision.describe)
def test_loading_does_not_widen_fp8(tiny_checkpoint, tmp_path, precision):
    """ONNX Runtime folds a Cast of constants into float32 constants, but not a DequantizeLinear."""
    recipe = Recipe("fp8", precision, precision, precision)
    engine = build(build_source(tiny_checkpoint("gqa"), recipe), tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(engine.path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    codes = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    # qkv, o, gate, up, down in two layers; head and embedding
    assert len(codes) == 2 * 5 + 2
    largest = max(len(tensor.raw_data) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    assert largest <= 41 * 8 * 4  # a rotary table


def test_layers_may_differ(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(matmul, "INT8_ACTIVATIONS", 0)
    overrides = (
        Override("layers.0.mlp.down_proj", Precision("int8", CHANNEL, activations="int8/token")),
        Override("layers.1.*", Precision("nf4", 32)),
        Override("layers.1.self_attn.*", FP32),
        Override("layers.2.mlp.*", Precision("nvfp4", 16)),
    )
    recipe = Recipe("mixed", Precision("int4", 32), BFLOAT16, Precision("int8", 32), overrides=overrides)
    source = build_source(tiny_checkpoint("mqa_three_layers"), recipe)
    assert len({id(layer.structure) for layer in source.model.layers}) == 3
    hold(build(source, tmp_path), kept)


def test_rows_that_no_block_divides_are_refused():
    config = parse_config({**BASE, "model_type": "llama", "hidden_size": 72, "head_dim": 18})
    recipe = Recipe("r", Precision("int8", CHANNEL), FP32, FP32)
    answer = recipe_support(config, recipe)
    assert answer.level == "refused"
    assert "72" in answer.why


# Keys and values of the tiny models reach about 5.
KV_SCALES = dict.fromkeys(range(3), (5 / 127, 4 / 127))


def cache_recipe(kind: str, precision: Precision = FP32) -> Recipe:
    return Recipe(kind, precision, precision, precision, kv_cache=kind)


@pytest.mark.parametrize("shape", ["gqa", "head_dim", "mqa_three_layers"])
def test_an_int8_cache_holds_the_codes_of_its_scales(tiny_checkpoint, tmp_path, shape):
    source = build_source(tiny_checkpoint(shape), cache_recipe("int8"), kv_scales=KV_SCALES)
    engine = build(source, tmp_path)
    model = eager(source)
    forward = model.model.forward
    model.model.forward = lambda *given, **options: forward(
        *given, **{**options, "past_key_values": RoundedCache("int8", KV_SCALES[0]), "use_cache": True}
    )
    hold_but_for_boundaries(errors(engine, model))


def test_an_int8_cache_takes_a_quarter_of_the_memory(tiny_checkpoint, tmp_path):
    engine = build(build_source(tiny_checkpoint("gqa"), cache_recipe("int8"), kv_scales=KV_SCALES), tmp_path)
    types = {value["dtype"] for name, value in engine.result.signature["inputs"].items() if name.startswith("past")}
    assert types == {"int8"}
    with engine.runner(batch=2) as runner:
        assert {array.dtype for array in runner._cache.values()} == {np.dtype(np.int8)}


def test_an_int8_cache_without_scales_says_what_to_give(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError) as error:
        build(build_source(tiny_checkpoint("gqa"), cache_recipe("int8"), kv_scales={1: (1.0, 1.0)}), tmp_path)
    assert error.value.kind == "kv_cache.scales"
    assert "layers 0" in error.value.message
    assert "--qparams" in error.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kind for kind in KV_CACHES if kind not in ("fp32", "int8")])
def test_other_caches_are_refused(tiny_checkpoint, tmp_path, kind):
    assert capabilities()[f"kv-cache {kind}"].level == "refused"
    with pytest.raises(UnsupportedError, match=kind):
        build(build_source(tiny_checkpoint("gqa"), cache_recipe(kind), kv_scales=KV_SCALES), tmp_path)


def test_heads_in_standard_attention_have_no_int8_cache(tiny_checkpoint, tmp_path):
    source = build_source(tiny_checkpoint("gqa", head_dim=24), cache_recipe("int8"), kv_scales=KV_SCALES)
    assert recipe_support(source.config, source.recipe).level == "refused"
    with pytest.raises(UnsupportedError, match="24"):
        build(source, tmp_path)
