"""Recipes in the canonical model: the operators, the numbers on a second runtime, and what must stay untouched."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from calibration.coverage import coverage
from calibration.insert_precision import apply_recipe
from calibration.presets import load_recipe, parse_precision
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CanonicalModel, CheckpointWeight, RotaryTable, ScaleValue, Slice
from exporter.core.checker import check_canonical
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError, InputError
from exporter.core.recipe import Override, Precision, Recipe, all_precisions
from exporter.core.rounded_input import UNROUNDED, RoundedInput, match_rounded_input
from exporter.core.weights import QuantizedRows, weight_shape
from exporter.parity.graph_slice import CompiledSlice
from targets.onnxruntime.slice_session import SliceSession
from tests.support.canonical_llama import canonical_llama

MAX_SEQ_LEN = 16
RECIPES = {
    "bf16": load_recipe("bf16"),
    "fp16": load_recipe("fp16"),
    "int8": load_recipe("int8-weight"),
    "int6": load_recipe("int4-rtn", lm_head="int6", embedding="int6/g16"),
    "int4": load_recipe("int4-rtn"),
    "int4_asym": load_recipe("int4-rtn-asym", embedding="int8/g16/asym"),
    "mixed": load_recipe("int4-rtn", group_size=16, lm_head="fp16", embedding="fp32"),
}
Factory = Callable[..., Path]


def stored_and_plain(part: Slice, rows: WeightRows) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Feeds for the converted structure, and the same weights as float32 for the plain one."""
    stored: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    for name, weight in part.weights.items():
        if isinstance(weight, ScaleValue):
            stored[name] = weight.values()
            continue
        if isinstance(weight, RotaryTable):
            stored[name] = plain[name] = weight.values()
            continue
        values = rows(weight, 0, weight_shape(rows.checkpoint, weight)[0])
        if isinstance(values, QuantizedRows):
            stored |= {f"{name}.codes": values.codes, f"{name}.scales": values.scales}
            if values.zero_points is not None:
                stored[f"{name}.zero_points"] = values.zero_points
            plain[name] = values.dequantize()
        else:
            stored[name], plain[name] = values, values.astype(np.float32)
    return stored, plain


def activations(config: ModelConfig, kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    hidden = rng.standard_normal((2, 4, config.hidden_size)).astype(np.float32)
    if kind == "embedding":
        return {"input_ids": rng.integers(0, config.vocab_size, (2, 4))}
    if kind == "head":
        return {"hidden": hidden, "rows": np.array([3, 6])}
    cache = (2, config.num_kv_heads, MAX_SEQ_LEN, config.head_dim)
    write = np.array([2, 5])
    return {
        "hidden": hidden,
        "position_ids": write[:, None] + np.arange(4),
        "write_indices": write,
        "nonpad_kv_seqlen": write + 4,
        "past_key": rng.standard_normal(cache).astype(np.float32),
        "past_value": rng.standard_normal(cache).astype(np.float32),
    }


def assert_same_results(
    plain: CanonicalModel, converted: CanonicalModel, rows: WeightRows, config: ModelConfig
) -> None:
    """Both run on ONNX Runtime without its optimizer; the plain one on dequantized weights.

    The operators after the weights are the same and so are their inputs: no tolerance is needed.
    """
    for before, after in zip(plain.slices, converted.slices, strict=True):
        stored, restored = stored_and_plain(after, rows)
        feeds = activations(config, before.kind)
        expected = SliceSession(before.structure).run({**feeds, **restored})
        found = SliceSession(after.structure).run({**feeds, **stored})
        # As parity runs it: weights made ready first.
        compiled = CompiledSlice(after.structure)
        split = compiled.run(compiled.prepare(stored), feeds)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{after.label}: {name}")
            np.testing.assert_array_equal(split[name], value, err_msg=f"{after.label}, split: {name}")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("shape", ["gqa", "biases", "tied", "head_dim"])
def test_computes_with_the_stored_weights(tiny_checkpoint: Factory, shape: str, recipe: Recipe) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(shape))
    plain = canonical_llama(checkpoint.config, MAX_SEQ_LEN)
    converted = apply_recipe(plain, recipe, checkpoint.config)
    assert_same_results(plain, converted, WeightRows(checkpoint), checkpoint.config)
    for part in converted.slices:
        onnx.shape_inference.infer_shapes(ir.to_proto(part.structure), check_type=True, strict_mode=True)


@pytest.fixture
def config(tiny_checkpoint: Factory) -> ModelConfig:
    return ModelConfig.from_directory(tiny_checkpoint("biases"))


def operators(structure: ir.Model) -> list[str]:
    return [node.op_type for node in structure.graph]


def test_operators_inputs_and_attributes(config: ModelConfig) -> None:
    plain = canonical_llama(config, MAX_SEQ_LEN)
    layer = apply_recipe(plain, RECIPES["int4_asym"], config).layers[0].structure
    assert operators(layer).count("DequantizeLinear") == 4
    assert [o for o in operators(layer) if o != "DequantizeLinear"] == operators(plain.layers[0].structure)
    node = next(n for n in layer.graph if n.op_type == "DequantizeLinear")
    assert node.attributes["axis"].as_int() == 1 and node.attributes["block_size"].as_int() == 32
    name = node.outputs[0].name
    assert [v.name for v in node.inputs] == [f"{name}.codes", f"{name}.scales", f"{name}.zero_points"]
    types = {v.name: v.dtype for v in layer.graph.inputs}
    assert types[f"{name}.codes"] == types[f"{name}.zero_points"] == ir.DataType.UINT4
    assert types[f"{name}.scales"] == types["input_layernorm.weight"] == ir.DataType.FLOAT
    assert types["self_attn.qkv_proj.bias"] == types["rotary.cos_cache"] == ir.DataType.FLOAT
    assert name not in types


def test_halves_keep_their_name_and_get_a_cast(config: ModelConfig) -> None:
    head = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), RECIPES["bf16"], config).head
    types = {v.name: v.dtype for v in head.structure.graph.inputs}
    assert types["lm_head.weight"] == ir.DataType.BFLOAT16 and types["norm.weight"] == ir.DataType.FLOAT
    assert operators(head.structure).count("Cast") == 1
    weight = head.weights["lm_head.weight"]
    assert isinstance(weight, CheckpointWeight) and weight.precision.kind == "bf16"


@pytest.mark.parametrize("name", RECIPES)
def test_the_source_model_is_untouched_and_sharing_is_kept(config: ModelConfig, name: str) -> None:
    plain = canonical_llama(config, MAX_SEQ_LEN)
    before = [ir.to_proto(part.structure).SerializeToString(deterministic=True) for part in plain.slices]
    converted = apply_recipe(plain, RECIPES[name], config)
    after = [ir.to_proto(part.structure).SerializeToString(deterministic=True) for part in plain.slices]
    assert before == after
    assert len({id(layer.structure) for layer in converted.layers}) == 1
    assert converted.layers[0].structure is not plain.layers[0].structure
    assert all(w.precision.kind == "fp32" for s in plain.slices for w in s.weights.values() if hasattr(w, "precision"))


def test_fp32_changes_nothing(config: ModelConfig) -> None:
    plain = canonical_llama(config, MAX_SEQ_LEN)
    converted = apply_recipe(plain, load_recipe("fp32"), config)
    for before, after in zip(plain.slices, converted.slices, strict=True):
        assert operators(before.structure) == operators(after.structure) and before.weights == after.weights


def test_undivided_widths_stay_fp32_exactly_where_coverage_says(tiny_checkpoint: Factory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa", intermediate_size=176))
    config, recipe = checkpoint.config, load_recipe("int4-rtn", group_size=64)
    plain = canonical_llama(config, MAX_SEQ_LEN)
    converted = apply_recipe(plain, recipe, config)
    actual = {
        name: weight.precision
        for part in converted.slices
        for weight in part.weights.values()
        if isinstance(weight, CheckpointWeight)
        for name in weight.sources
    }
    for tensor in coverage(config, recipe).tensors:
        assert actual[tensor.name] == tensor.actual, tensor.name
    assert actual["model.layers.0.mlp.down_proj.weight"].kind == "fp32"
    assert_same_results(plain, converted, WeightRows(checkpoint), config)


def uniform(precision: Precision) -> Recipe:
    return Recipe("uniform", precision, precision, precision.weight_only)


def input_scales(config: ModelConfig) -> dict[str, float]:
    """Some scale for every module: small enough that some inputs saturate at it."""
    modules = [f"model.layers.{layer}.{name}" for layer in range(config.num_layers) for name in config.linear_shapes]
    return {module: 0.004 + 0.0001 * index for index, module in enumerate([*modules, "lm_head"])}


@pytest.fixture(scope="module")
def wide(tiny_checkpoint: Factory) -> Checkpoint:
    """Every group size divides its widths."""
    return Checkpoint.open(tiny_checkpoint("biases", hidden_size=256, intermediate_size=512, num_hidden_layers=1))


WEIGHTS = [precision for precision in all_precisions() if not precision.activations]
ROUNDED = [precision for precision in all_precisions() if precision.activations]
# Rounding an input is independent of how the weight is stored: each way, on each kind of weight.
SOME_ROUNDED = [p for p in ROUNDED if p.group_size in (32, -1, 0) and p.kind != "int6"]
assert not any(p.activations in UNROUNDED for p in SOME_ROUNDED)


@pytest.mark.parametrize("precision", WEIGHTS, ids=Precision.describe)
def test_every_precision_computes_with_its_dequantized_weights(wide: Checkpoint, precision: Precision) -> None:
    plain = canonical_llama(wide.config, MAX_SEQ_LEN)
    converted = apply_recipe(plain, uniform(precision), wide.config)
    check_canonical(converted, wide.config)
    assert_same_results(plain, converted, WeightRows(wide), wide.config)


@pytest.mark.parametrize("precision", ROUNDED, ids=Precision.describe)
def test_every_rounding_of_inputs_is_canonical(wide: Checkpoint, precision: Precision) -> None:
    converted = apply_recipe(
        canonical_llama(wide.config, MAX_SEQ_LEN), uniform(precision), wide.config, input_scales(wide.config)
    )
    check_canonical(converted, wide.config)
    for part in converted.slices:
        onnx.shape_inference.infer_shapes(ir.to_proto(part.structure), check_type=True, strict_mode=True)
        products = [node for node in part.structure.graph if node.op_type == "MatMul"]
        matches = [match_rounded_input(node.inputs[0]) for node in products]
        done = None if precision.activations in UNROUNDED else precision.activations
        assert [match.activations if match else None for match in matches] == [done] * len(products)


def test_nvfp4_inputs_have_a_scale_and_no_nodes(wide: Checkpoint) -> None:
    """The graph computes what it does without them, and carries each matrix's scale for targets that round."""
    precision, config = Precision("nvfp4", 16, activations="nvfp4/tensor"), wide.config
    plain = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision.weight_only), config)
    scales = input_scales(config)
    asked = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision), config, scales)
    for without, part in zip(plain.slices, asked.slices, strict=True):
        assert operators(part.structure) == operators(without.structure)
        stored, _ = stored_and_plain(part, WeightRows(wide))
        feeds = activations(config, part.kind)
        expected = SliceSession(without.structure).run({**feeds, **stored_and_plain(without, WeightRows(wide))[0]})
        found = SliceSession(part.structure).run({**feeds, **stored})
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    carried = asked.layers[0].weights["mlp.down_proj.weight.input_scale"]
    assert isinstance(carried, ScaleValue)
    assert carried.values() == np.float32(scales["model.layers.0.mlp.down_proj"])
    with pytest.raises(InputError, match="needs the calibrated scale"):
        apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision), config)


def test_only_a_scale_that_a_precision_asks_for_may_lie_idle(wide: Checkpoint) -> None:
    """The checker refuses any other input without use, and a scale that nobody asked for."""
    precision = Precision("nvfp4", 16, activations="nvfp4/tensor")
    model = apply_recipe(
        canonical_llama(wide.config, MAX_SEQ_LEN), uniform(precision), wide.config, input_scales(wide.config)
    )
    head = model.head
    weight = head.weights["lm_head.weight"]
    assert isinstance(weight, CheckpointWeight)
    head.weights["lm_head.weight"] = replace(weight, precision=precision.weight_only)
    with pytest.raises(BudgetError, match="inputs without use"):
        check_canonical(model, wide.config)


def rounded_products(part: Slice) -> Iterator[tuple[ir.Node, RoundedInput]]:
    for node in part.structure.graph:
        match = match_rounded_input(node.inputs[0]) if node.op_type == "MatMul" else None
        if match:
            yield node, match


def simulated(x: np.ndarray, match: RoundedInput, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """docs/recipes.md in torch: scale, codes, values."""
    top = {"int8": 127.0, "fp8": 448.0}[match.kind]
    values = torch.from_numpy(x)
    if match.scale is None:
        scale = (values.abs().amax(-1, keepdim=True) / top).clamp(min=2.0**-126)
    else:
        scale = torch.from_numpy(feeds[match.scale.name or ""])
    codes = values / scale
    if match.kind == "int8":
        return (codes.round().clamp(-128, 127) * scale).numpy()
    return (codes.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).numpy()


@pytest.mark.parametrize("precision", SOME_ROUNDED, ids=Precision.describe)
def test_inputs_are_rounded_as_the_simulation_says(wide: Checkpoint, precision: Precision) -> None:
    """On ONNX Runtime without its optimizer, bit for bit: each rounding is fed the value that the slice really had.

    Products of rounded inputs are then compared with float64 ones; no code can flip between the two.
    """
    config = wide.config
    converted = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision), config, input_scales(config))
    for part in (converted.layers[0], converted.head):
        stored, weights = stored_and_plain(part, WeightRows(wide))
        feeds = {**activations(config, part.kind), **stored}
        for product, match in rounded_products(part):
            rounded, weight = product.inputs[0], product.inputs[1].producer().inputs[0]
            names = [value.name for value in (match.source, rounded, product.outputs[0])]
            found = SliceSession(part.structure).run(feeds, names)
            x, y, out = (found[name] for name in names)
            np.testing.assert_array_equal(y, simulated(x, match, feeds), err_msg=str(rounded.name))
            assert (y != x).any()
            exact = y.astype(np.float64) @ weights[weight.name].astype(np.float64).T
            # float32 sums of K products, in any order: K half units of the sum of magnitudes.
            bound = np.abs(y).astype(np.float64) @ np.abs(weights[weight.name]).astype(np.float64).T
            assert (np.abs(out - exact) <= 2.0**-24 * y.shape[-1] * bound).all()


@pytest.mark.parametrize("precision", SOME_ROUNDED, ids=Precision.describe)
def test_rounded_slices_run_with_weights_made_ready(wide: Checkpoint, precision: Precision) -> None:
    config = wide.config
    converted = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision), config, input_scales(config))
    for part in (converted.layers[0], converted.head):
        stored, _ = stored_and_plain(part, WeightRows(wide))
        feeds = activations(config, part.kind)
        expected, compiled = SliceSession(part.structure).run({**feeds, **stored}), CompiledSlice(part.structure)
        found = compiled.run(compiled.prepare(stored), feeds)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("kind", ["int8/token", "fp8/token"])
def test_tokens_of_zeros_stay_zeros(wide: Checkpoint, kind: str) -> None:
    precision = Precision("int8", -1, activations=kind) if kind.startswith("int8") else Precision("fp8", -1, True, kind)
    head = apply_recipe(canonical_llama(wide.config, MAX_SEQ_LEN), uniform(precision), wide.config).head
    stored, _ = stored_and_plain(head, WeightRows(wide))
    feeds = activations(wide.config, "head")
    feeds["hidden"][0] = 0
    logits = SliceSession(head.structure).run({**feeds, **stored})["logits"]
    assert not logits[0].any() and np.isfinite(logits).all() and logits[1].any()


def test_layers_differ_where_overrides_say(tiny_checkpoint: Factory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("mqa_three_layers"))
    recipe = replace(
        load_recipe("int4-rtn"),
        overrides=(
            Override("layers.1.mlp.*", parse_precision("nf4/g64")),
            Override("layers.1.mlp.down_proj", parse_precision("int8/channel+int8/token")),
        ),
    )
    plain = canonical_llama(checkpoint.config, MAX_SEQ_LEN)
    converted = apply_recipe(plain, recipe, checkpoint.config)
    check_canonical(converted, checkpoint.config)
    first, second, third = converted.layers
    assert first.structure is third.structure and first.structure is not second.structure
    found = {name: w.precision.describe() for name, w in second.weights.items() if isinstance(w, CheckpointWeight)}
    assert found["mlp.gate_up_proj.weight"] == "nf4/g64" and found["self_attn.qkv_proj.weight"] == "int4/g32"
    assert found["mlp.down_proj.weight"] == "int8/channel+int8/token"
    assert [match.activations for _, match in rounded_products(second)] == ["int8/token"]


def test_packed_matrices_that_disagree_are_refused(config: ModelConfig) -> None:
    recipe = replace(load_recipe("int4-rtn"), overrides=(Override("*.v_proj", Precision("int8", 32)),))
    with pytest.raises(InputError, match="computed together") as caught:
        apply_recipe(canonical_llama(config, MAX_SEQ_LEN), recipe, config)
    assert caught.value.kind == "recipe.packs"


@pytest.mark.parametrize("scale", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_calibrated_scale_that_is_missing_or_no_scale_is_refused(config: ModelConfig, scale: float | None) -> None:
    scales = input_scales(config)
    del scales["model.layers.1.self_attn.o_proj"]
    if scale is not None:
        scales["model.layers.1.self_attn.o_proj"] = scale
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj") as caught:
        apply_recipe(canonical_llama(config, MAX_SEQ_LEN), load_recipe("fp8"), config, scales)
    assert caught.value.kind == "recipe.input_scale" and "--calibration" in caught.value.remedy


def test_scales_of_inputs_are_weights_of_their_layer(config: ModelConfig) -> None:
    """Two layers share a structure and differ in their scales; a packed matrix takes that of its first part."""
    scales = input_scales(config)
    recipe = replace(load_recipe("fp8"), overrides=())
    first, second = apply_recipe(canonical_llama(config, MAX_SEQ_LEN), recipe, config, scales).layers
    assert first.structure is second.structure
    for index, layer in enumerate((first, second)):
        for name, module in (("self_attn.qkv_proj", "self_attn.q_proj"), ("mlp.gate_up_proj", "mlp.gate_proj")):
            fed = layer.weights[f"{name}.weight.input_scale"]
            assert fed == ScaleValue(scales[f"model.layers.{index}.{module}"])


def test_a_head_of_its_own_after_transforms(tiny_checkpoint: Factory) -> None:
    """The model was traced tied; the config says that the transformed checkpoint has a head of its own."""
    config = ModelConfig.from_directory(tiny_checkpoint("tied"))
    plain = canonical_llama(config, MAX_SEQ_LEN)
    tied = apply_recipe(plain, load_recipe("int4-rtn"), config)
    apart = apply_recipe(plain, load_recipe("int4-rtn"), replace(config, tie_word_embeddings=False))
    for model, source in ((tied, "model.embed_tokens.weight"), (apart, "lm_head.weight")):
        weight = model.head.weights["lm_head.weight"]
        assert isinstance(weight, CheckpointWeight) and weight.sources == (source,)
    check_canonical(apart, replace(config, tie_word_embeddings=False))
