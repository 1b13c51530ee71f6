"""The checker: passes what is canonical, at every precision, and names what is not."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from calibration.insert_precision import apply_recipe
from exporter.core.canonical import CanonicalModel, CheckpointWeight, Slice
from exporter.core.checker import check_canonical
from exporter.core.errors import BudgetError
from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe
from exporter.core.rounded_input import match_rounded_input
from tests.support.canonical_llama import canonical_llama
from tests.support.tiny import SHAPES
from tests.support.traced import tiny_config

CONFIG = tiny_config("biases")
PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision("bf16"),
    "fp16": Precision("fp16"),
    "int8": Precision("int8", 32),
    "int6": Precision("int6", 32),
    "int4": Precision("int4", 32),
    "int4 asymmetric": Precision("int4", 32, symmetric=False),
    "int8 channel": Precision("int8", CHANNEL),
    "fp8": Precision("fp8", TENSOR),
    "nf4": Precision("nf4", 64),
    "nvfp4": Precision("nvfp4", 16),
    "mxfp4": Precision("mxfp4", 32),
    "w8a8": Precision("int8", CHANNEL, activations="int8/token"),
    "w8a8 static": Precision("int8", CHANNEL, activations="int8/tensor"),
    "fp8 dynamic": Precision("fp8", CHANNEL, activations="fp8/token"),
    "fp8 static": Precision("fp8", TENSOR, activations="fp8/tensor"),
}
SCALES = {f"model.layers.{i}.{name}": 0.01 for i in range(2) for name in CONFIG.linear_shapes} | {"lm_head": 0.01}


def model(precision: str = "fp32") -> CanonicalModel:
    chosen = PRECISIONS[precision]
    recipe = Recipe("test", chosen, chosen, chosen.weight_only)
    return apply_recipe(canonical_llama(CONFIG, 64), recipe, CONFIG, SCALES)


def node(piece: Slice, kind: str) -> ir.Node:
    return next(each for each in piece.structure.graph if each.op_type == kind)


def value(piece: Slice, name: str) -> ir.Value:
    return next(each for each in piece.structure.graph.inputs if each.name == name)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_passes(shape: str) -> None:
    config = tiny_config(shape)
    check_canonical(canonical_llama(config, 64), config)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_passes(precision: str) -> None:
    check_canonical(model(precision), CONFIG)


def broken_operator(m: CanonicalModel) -> None:
    node(m.layers[0], "Swish").op_type = "Relu"


def broken_domain(m: CanonicalModel) -> None:
    node(m.layers[0], "Swish").domain = "com.microsoft"


def broken_opset(m: CanonicalModel) -> None:
    m.head.structure.graph.opset_imports[""] = 23


def broken_attribute(m: CanonicalModel) -> None:
    node(m.layers[0], "Attention").attributes["causal"] = ir.AttrInt64("causal", 1)


def broken_input_name(m: CanonicalModel) -> None:
    value(m.layers[0], "write_indices").name = "positions"


def broken_input_order(m: CanonicalModel) -> None:
    inputs = m.layers[0].structure.graph.inputs
    first = inputs.pop(0)
    inputs.insert(1, first)


def broken_input_type(m: CanonicalModel) -> None:
    value(m.head, "rows").type = ir.TensorType(ir.DataType.INT32)


def broken_output(m: CanonicalModel) -> None:
    m.embedding.structure.graph.outputs[0].name = "embedded"


def undeclared_weight(m: CanonicalModel) -> None:
    del m.layers[1].weights["mlp.down_proj.weight"]


def unfed_weight(m: CanonicalModel) -> None:
    m.layers[1].weights["mlp.extra.weight"] = m.layers[1].weights["mlp.down_proj.weight"]


def unknown_source(m: CanonicalModel) -> None:
    m.layers[1].weights["mlp.down_proj.weight"] = CheckpointWeight(("model.layers.7.mlp.down_proj.weight",))


def misshapen_weight(m: CanonicalModel) -> None:
    m.layers[1].weights["mlp.down_proj.weight"] = CheckpointWeight(("model.layers.1.mlp.up_proj.weight",))


def other_precision(m: CanonicalModel) -> None:
    weight = m.layers[1].weights["mlp.down_proj.weight"]
    assert isinstance(weight, CheckpointWeight)
    m.layers[1].weights["mlp.down_proj.weight"] = CheckpointWeight(weight.sources, Precision("bf16"))


def weight_inside(m: CanonicalModel) -> None:
    graph = m.head.structure.graph
    name = "lm_head.data"
    constant = ir.Value(name=name, const_value=ir.tensor(np.zeros((320, 64), np.float32), name=name))
    graph.initializers.add(constant)
    node(m.head, "Transpose").replace_input_with(0, constant)
    graph.inputs.remove(value(m.head, "lm_head.weight"))
    del m.head.weights["lm_head.weight"]


def layers_exchanged(m: CanonicalModel) -> None:
    m.layers.reverse()


def layer_missing(m: CanonicalModel) -> None:
    m.layers.pop()


def unsorted_nodes(m: CanonicalModel) -> None:
    graph = m.head.structure.graph
    last = graph[-1]
    graph.remove(last)
    graph.insert_before(graph[0], last)


@pytest.mark.parametrize(
    ("damage", "label", "reason"),
    [
        (broken_operator, "layer 0", "ai.onnx::Relu"),
        (broken_domain, "layer 0", "com.microsoft::Swish"),
        (broken_opset, "head", "opset"),
        (broken_attribute, "layer 0", "onnx.checker"),
        (broken_input_name, "layer 0", "'positions'"),
        (broken_input_order, "layer 0", "inputs start with"),
        (broken_input_type, "head", "'rows' is INT32"),
        (broken_output, "embedding", "outputs are ['embedded']"),
        (undeclared_weight, "layer 1", "'mlp.down_proj.weight' belongs to no weight"),
        (unfed_weight, "layer 1", "no input 'mlp.extra.weight'"),
        (unknown_source, "layer 1", "model.layers.7"),
        (misshapen_weight, "layer 1", "shape"),
        (other_precision, "layer 1", "is FLOAT, not BFLOAT16"),
        (weight_inside, "head", "'lm_head.data' (FLOAT [320, 64])"),
        (layers_exchanged, "the model", "numbered [1, 0]"),
        (layer_missing, "the model", "1 layers"),
        (unsorted_nodes, "head", "onnx.checker"),
    ],
)
def test_damage_is_named_with_its_slice(damage: Callable[[CanonicalModel], None], label: str, reason: str) -> None:
    m = model()
    damage(m)
    with pytest.raises(BudgetError) as caught:
        check_canonical(m, CONFIG)
    assert caught.value.kind == "canonical.invalid"
    assert caught.value.message.startswith(label)
    assert reason in caught.value.message


def scales_elsewhere(m: CanonicalModel) -> None:
    """The scales of one matrix are used for another of the same shape."""
    graph = m.layers[0].structure.graph
    nodes = [each for each in graph if each.op_type == "DequantizeLinear"]
    wrong = value(m.layers[0], "mlp.down_proj.weight.scales")
    next(each for each in nodes if "gate_up" in (each.inputs[0].name or "")).replace_input_with(1, wrong)


def other_axis(m: CanonicalModel) -> None:
    node(m.layers[0], "DequantizeLinear").attributes["axis"] = ir.AttrInt64("axis", 0)


def no_blocks(m: CanonicalModel) -> None:
    node(m.layers[0], "DequantizeLinear").attributes.pop("block_size")


def codes_unscaled(m: CanonicalModel) -> None:
    """Codes that are read without their scales."""
    codes = value(m.layers[0], "mlp.down_proj.weight.codes")
    use = next(iter(codes.uses())).node
    cast = ir.node("Cast", [codes], attributes={"to": ir.DataType.FLOAT})
    m.layers[0].structure.graph.insert_before(use, cast)
    for user, index in tuple(use.outputs[0].uses()):
        user.replace_input_with(index, cast.outputs[0])


def no_zero_points(m: CanonicalModel) -> None:
    use = next(iter(value(m.layers[0], "mlp.down_proj.weight.codes").uses())).node
    use.resize_inputs(2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (scales_elsewhere, "do not meet"),
        (other_axis, "axis 1"),
        (no_blocks, "in blocks"),
        (codes_unscaled, "do not meet"),
        (no_zero_points, "do not meet"),
    ],
)
def test_damaged_quantization_is_named(damage: Callable[[CanonicalModel], None], reason: str) -> None:
    m = model("int4 asymmetric")
    damage(m)
    with pytest.raises(BudgetError, match="layer 0 is not canonical") as caught:
        check_canonical(m, CONFIG)
    assert reason in caught.value.message


def other_group(m: CanonicalModel) -> None:
    node(m.layers[0], "DequantizeLinear").attributes["block_size"] = ir.AttrInt64("block_size", 16)


def test_blocks_of_another_size_than_stored_are_named() -> None:
    m = model("int4 asymmetric")
    other_group(m)
    with pytest.raises(BudgetError, match="not dequantized in blocks of 32"):
        check_canonical(m, CONFIG)


def table_exchanged(m: CanonicalModel) -> None:
    """The codes of one kind, looked up in the levels of another."""
    for name, each in m.head.weights.items():
        if isinstance(each, CheckpointWeight) and each.precision.kind == "nvfp4":
            m.head.weights[name] = CheckpointWeight(each.sources, Precision("nf4", 16))


def table_unscaled(m: CanonicalModel) -> None:
    graph = m.head.structure.graph
    product = next(each for each in graph if each.op_type == "Mul")
    flat = next(iter(product.outputs[0].uses())).node
    flat.replace_input_with(0, product.inputs[0])


def table_scaled_twice(m: CanonicalModel) -> None:
    graph = m.head.structure.graph
    scales = value(m.head, "lm_head.weight.scales")
    graph.append(ir.node("Cast", [scales], attributes={"to": ir.DataType.FLOAT}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (table_exchanged, "is looked up in e2m1 by 16, stored as nf4/g16"),
        (table_unscaled, "do not meet as a table weight's do"),
        (table_scaled_twice, "do not meet as a table weight's do"),
    ],
)
def test_damaged_table_weights_are_named(damage: Callable[[CanonicalModel], None], reason: str) -> None:
    m = model("nvfp4")
    damage(m)
    with pytest.raises(BudgetError, match="head is not canonical") as caught:
        check_canonical(m, CONFIG)
    assert "'lm_head.weight'" in caught.value.message and reason in caught.value.message


def rounding_dropped(m: CanonicalModel) -> None:
    product = node(m.head, "MatMul")
    found = match_rounded_input(product.inputs[0])
    assert found is not None
    product.replace_input_with(0, found.source)
    m.head.structure.graph.remove(list(reversed(found.nodes)), safe=True)


def rounding_not_asked(m: CanonicalModel) -> None:
    weight = m.head.weights["lm_head.weight"]
    assert isinstance(weight, CheckpointWeight)
    m.head.weights["lm_head.weight"] = CheckpointWeight(weight.sources, weight.precision.weight_only)


def rounding_elsewhere(m: CanonicalModel) -> None:
    """Quantized and dequantized on the way into the norm."""
    norm = node(m.head, "RMSNormalization")
    hidden = norm.inputs[0]
    found = match_rounded_input(node(m.head, "MatMul").inputs[0])
    assert found is not None and hidden is not None
    magnitude = ir.node("Abs", [hidden])
    m.head.structure.graph.insert_before(norm, magnitude)
    norm.replace_input_with(0, magnitude.outputs[0])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (rounding_dropped, "the input of 'lm_head.weight' is rounded to nothing, not to int8/token"),
        (rounding_not_asked, "the input of 'lm_head.weight' is rounded to int8/token, not to nothing"),
        (rounding_elsewhere, "rounds no input of a matrix"),
    ],
)
def test_damaged_roundings_are_named(damage: Callable[[CanonicalModel], None], reason: str) -> None:
    m = model("w8a8")
    damage(m)
    with pytest.raises(BudgetError, match="head is not canonical") as caught:
        check_canonical(m, CONFIG)
    assert reason in caught.value.message


def test_a_scale_of_another_input_is_named() -> None:
    m = model("fp8 static")
    layer = m.layers[0]
    wrong = value(layer, "mlp.down_proj.weight.input_scale")
    for user, index in tuple(value(layer, "self_attn.o_proj.weight.input_scale").uses()):
        user.replace_input_with(index, wrong)
    with pytest.raises(
        BudgetError, match=r"'self_attn.o_proj.weight' has the scale 'mlp.down_proj.weight.input_scale'"
    ):
        check_canonical(m, CONFIG)


def test_large_float_constants_are_weights_inside() -> None:
    m = model("nf4")
    graph = m.head.structure.graph
    levels = next(each for each in graph.initializers.values() if "levels" in (each.name or ""))
    levels.const_value = ir.tensor(np.zeros(17, np.float32))
    with pytest.raises(BudgetError, match=r"levels.nf4' \(FLOAT \[17\]\) is not a small constant"):
        check_canonical(m, CONFIG)


def test_half_precision_passes_through_a_cast() -> None:
    m = model("bf16")
    cast = node(m.layers[0], "Cast")
    source, out = cast.inputs[0], cast.outputs[0]
    ir.convenience.replace_all_uses_with(out, source)
    with pytest.raises(BudgetError, match="must pass through a Cast"):
        check_canonical(m, CONFIG)


def test_a_structure_shared_by_many_layers_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    seen = []
    monkeypatch.setattr(onnx.checker, "check_model", lambda proto: seen.append(proto))
    config = tiny_config(num_hidden_layers=6)
    check_canonical(canonical_llama(config, 64), config)
    assert len(seen) == 3
