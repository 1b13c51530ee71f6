"""Recipes in the canonical model: the operators, the numbers on a second runtime, and what must stay untouched."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.coverage import coverage
from calibration.insert_precision import apply_recipe
from calibration.presets import load_recipe
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CanonicalModel, CheckpointWeight, RotaryTable, Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from exporter.core.weights import QuantizedRows, weight_shape
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
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{after.label}: {name}")


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
