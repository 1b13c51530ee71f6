"""What slices become: which kernels are called with which tensors, what layers share, and what is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from exporter.core.canonical import CanonicalModel, RotaryTable, Slice
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import CHANNEL, Precision, Recipe, all_precisions
from exporter.core.rounded_input import match_rounded_input
from exporter.core.table_weight import match_table_weight
from targets.base import BuildSource
from targets.tvm.activations import activation_rounding
from targets.tvm.lower.program import LoweredModel, Program
from tests.support.tiny import SHAPES
from tests.targets.engines import RECIPES, build_source
from tests.targets.test_lowering import damaged, interleave, node_of, other_past, set_attribute
from tests.targets.tvm.builds import lowered, tvm_source

INTEGER = ["norm_quantize", "linear_int", "rotary_cache", "attention", "quantize", "linear_int"]
INTEGER += ["norm_quantize", "linear_int", "quantize", "linear_int"]
FLOAT = ["norm", "linear_float", "rotary_cache", "attention", "linear_float", "norm", "linear_float", "linear_float"]


def kernels(program: Program) -> list[str]:
    return [call.kernel.factory for call in program.calls]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_slice_is_a_fixed_list_of_calls(tiny_checkpoint, shape, recipe):
    model = lowered(tvm_source(tiny_checkpoint(shape), recipe))
    precision = RECIPES[recipe]
    for layer in model.layers:
        assert kernels(layer.program) == (INTEGER if precision.linear.is_integer else FLOAT)
    assert kernels(model.embedding.program) == [
        "embedding_int" if precision.embedding.is_integer else "embedding_float"
    ]
    head = ["norm_quantize", "linear_int"] if precision.lm_head.is_integer else ["norm", "linear_float"]
    assert kernels(model.head.program) == head


def test_calls_follow_the_contract(tiny_checkpoint):
    """Kernel parameters are inputs, then what is changed in place, then fresh outputs."""
    source = tvm_source(tiny_checkpoint("biases"), "int4-asym", "int8")
    layer, config = lowered(source).layers[0].program, source.config
    norm, qkv, rotary, attention, codes, output, _, gate_up, _, down = layer.calls
    wide, hidden, precision = config.intermediate_size, config.hidden_size, RECIPES["int4-asym"].linear
    assert norm.kernel.arguments == (hidden, 16, config.rms_norm_eps, False, "shared-exponent")
    assert [tensor.dtype for tensor in norm.outputs] == ["int32", "int32", "int32", "float32"]
    assert [tensor.shape for tensor in norm.outputs] == [
        ("T", hidden // 4), ("T", hidden // 16), ("T", hidden // 16), ("T",),
    ]  # fmt: skip
    assert qkv.kernel.arguments == (precision, 128, hidden, "plain", True)
    assert [tensor.name for tensor in qkv.inputs[4:]] == ["self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"]
    assert rotary.kernel.arguments == (4, 2, 16, "int8", 0.25)
    assert [tensor.name for tensor in rotary.inputs[1:]] == [
        "rotary.cos_cache", "rotary.sin_cache", "positions", "token_rows",
    ]  # fmt: skip
    assert rotary.written == layer.cache
    assert [tensor.name for tensor in layer.cache] == ["key", "value", "key_scale", "value_scale"]
    assert attention.inputs == (*rotary.outputs, layer.parameters[3], *layer.cache)
    assert codes.kernel.arguments == (64, 16, "shared-exponent")
    assert (output.kernel.arguments[3], output.written) == ("add", (layer.parameters[0],))
    assert gate_up.kernel.arguments == (precision, 2 * wide, hidden, "swiglu", True)
    assert gate_up.outputs[0].shape == ("T", wide)
    assert (down.kernel.arguments[1:], down.written) == ((hidden, wide, "add", True), (layer.parameters[0],))


def test_the_head_reads_the_wanted_rows_and_fills_the_logits(tiny_checkpoint):
    head = lowered(tvm_source(tiny_checkpoint("odd_vocabulary"), "int8")).head.program
    norm, product = head.calls
    assert [tensor.name for tensor in norm.inputs] == ["hidden", "out_rows", "norm.weight"]
    assert norm.kernel.arguments[-2:] == (True, "group")
    assert [tensor.dtype for tensor in norm.outputs] == ["int32", "float32", "int32"]
    assert [tensor.shape[0] for tensor in norm.outputs] == ["Q", "Q", "Q"]
    assert product.written == (head.result,)
    assert (head.result.name, head.result.shape) == ("logits", ("Q", 333))


def test_equal_layers_share_one_function(tiny_checkpoint):
    source = tvm_source(tiny_checkpoint("mqa_three_layers"), "int4")
    assert lowered(source).layer_functions == ("layer",) * 3
    assert lowered(source, model=with_epsilon(source.model, 1)).layer_functions == ("layer_0", "layer_1", "layer_0")


def with_epsilon(model: CanonicalModel, layer: int) -> CanonicalModel:
    """The same model with one layer's epsilon changed: a function of its own."""
    return damaged(model, layer, set_attribute("RMSNormalization", "epsilon", 0.25))


def test_layers_of_equal_programs_but_other_structures_share_one_function(tiny_checkpoint):
    source = tvm_source(tiny_checkpoint("mqa_three_layers"), "int4")
    layers = [Slice(part.kind, part.index, part.structure.clone(), part.weights) for part in source.model.layers]
    model = CanonicalModel(source.model.embedding, layers, source.model.head)
    assert lowered(source, model=model).layer_functions == ("layer",) * 3


def stored_names(model: LoweredModel) -> list[str]:
    return [stored.name for part in model.slices for stored in part.stored]


def test_weights_carry_their_layer_and_gate_up_is_interleaved(tiny_checkpoint):
    model = lowered(tvm_source(tiny_checkpoint("gqa"), "int4"))
    assert "layers.1.self_attn.qkv_proj.weight" in stored_names(model)
    interleaved = [stored.name for part in model.slices for stored in part.stored if stored.interleaved]
    assert interleaved == ["layers.0.mlp.gate_up_proj.weight", "layers.1.mlp.gate_up_proj.weight"]


def swap_gate_and_up(structure: ir.Model) -> None:
    swish, mul = node_of(structure, "Swish"), node_of(structure, "Mul")
    gate, up = node_of(structure, "Split", 1).outputs
    swish.replace_input_with(0, up)
    mul.replace_input_with(1, gate)


def drop_residual(structure: ir.Model) -> None:
    last = structure.graph.outputs[0].producer()
    last.replace_input_with(0, last.inputs[1])


def old_residual(structure: ir.Model) -> None:
    last = structure.graph.outputs[0].producer()
    last.replace_input_with(0, structure.graph.inputs[0])


def unknown_operator(structure: ir.Model) -> None:
    node_of(structure, "Swish").op_type = "Elu"


def unknown_domain(structure: ir.Model) -> None:
    node_of(structure, "Swish").domain = "com.microsoft"


def wrong_axis(structure: ir.Model) -> None:
    node_of(structure, "Split").attributes["axis"] = ir.AttrInt64("axis", 1)


def no_rotation_of_keys(structure: ir.Model) -> None:
    rotary = node_of(structure, "RotaryEmbedding", 1)
    node_of(structure, "TensorScatter").replace_input_with(1, rotary.inputs[0])


def dead_node(structure: ir.Model) -> None:
    norm = node_of(structure, "RMSNormalization")
    structure.graph.append(ir.node("Swish", [norm.outputs[0]]))


def softcap(structure: ir.Model) -> None:
    node_of(structure, "Attention").attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def sum_of_products(structure: ir.Model) -> None:
    product = node_of(structure, "MatMul", 1).outputs[0]
    node_of(structure, "Add").replace_input_with(0, product)


def early_norm_after_residual(structure: ir.Model) -> None:
    """The second product of the block reads the stream as it was before the first residual."""
    node_of(structure, "RMSNormalization", 1).replace_input_with(0, structure.graph.inputs[0])


REFUSED = {
    "unknown operator": (unknown_operator, "ai.onnx.Elu is unknown"),
    "foreign operator": (unknown_domain, "com.microsoft.Swish is unknown"),
    "split along another axis": (wrong_axis, "axis 1"),
    "scatter along another axis": (set_attribute("TensorScatter", "axis", 1), "axis 1"),
    "values in the cache of keys": (other_past, "present_value is not the cache|come from past_key and past_key"),
    "keys without rotation": (no_rotation_of_keys, "RotaryEmbedding computes .*, which nothing uses"),
    "not causal": (set_attribute("Attention", "is_causal", 0), "is_causal = 0"),
    "softcap": (softcap, "softcap = 30"),
    "interleaved rotation": (interleave, "interleaved = 1"),
    "partial rotation": (set_attribute("RotaryEmbedding", "rotary_embedding_dim", 8), "rotary_embedding_dim = 8"),
    "swapped gate and up": (swap_gate_and_up, "Swish of something else than the first part"),
    "swish alpha": (set_attribute("Swish", "alpha", 1.7), "alpha = 1.7"),
    "lost residual": (drop_residual, "no bias and no residual"),
    "old residual": (old_residual, "an older state of the stream"),
    "norm of the old stream": (early_norm_after_residual, "read after the next residual"),
    "sum of products": (sum_of_products, "no bias and no residual"),
    "norm along another axis": (set_attribute("RMSNormalization", "axis", 1), "axis 1"),
    "unused node": (dead_node, "which nothing uses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_refused_by_name(tiny_checkpoint, name):
    damage, words = REFUSED[name]
    source = tvm_source(tiny_checkpoint("mqa_three_layers"), "fp32")
    with pytest.raises(UnsupportedError, match=words) as error:
        lowered(source, model=damaged(source.model, 1, damage))
    assert error.value.kind == "tvm.lowering"
    assert "layer 1" in error.value.message


@pytest.mark.parametrize("recipe", ["int4", "int4-asym"])
def test_scales_of_another_weight_are_refused(tiny_checkpoint, recipe):
    def damage(structure: ir.Model) -> None:
        first, second = (node_of(structure, "DequantizeLinear", index) for index in (0, 1))
        second.replace_input_with(1, first.inputs[1])

    source = tvm_source(tiny_checkpoint("gqa"), recipe)
    with pytest.raises(UnsupportedError, match="another weight"):
        lowered(source, model=damaged(source.model, 0, damage))


def test_a_graph_that_says_another_precision_than_its_weights_is_refused(tiny_checkpoint):
    source = tvm_source(tiny_checkpoint("gqa"), "int4")
    part = source.model.layers[0]
    name = "self_attn.o_proj.weight"
    weights = {**part.weights, name: replace(part.weights[name], precision=Precision("int4", 16))}
    layers = [Slice(part.kind, 0, part.structure, weights), source.model.layers[1]]
    with pytest.raises(UnsupportedError, match="is dequantized with axis"):
        lowered(source, model=CanonicalModel(source.model.embedding, layers, source.model.head))


W8A8 = Precision("int8", CHANNEL, activations="int8/token")
CODED = [Precision("nf4", 16), Precision("nvfp4", 16), Precision("mxfp4", 32), Precision("int4", CHANNEL), W8A8]


def coded_source(checkpoint: Path, precision: Precision) -> BuildSource:
    return build_source(checkpoint, Recipe("r", precision, precision, precision.weight_only))


@pytest.mark.parametrize("precision", CODED, ids=Precision.describe)
def test_codes_are_multiplied_as_integers(tiny_checkpoint, precision):
    layer = lowered(coded_source(tiny_checkpoint("gqa"), precision)).layers[0].program
    assert kernels(layer) == INTEGER
    group = {"int8": 64, "int4": 64}.get(precision.kind, precision.group_size)
    assert layer.calls[0].kernel.arguments[1] == group
    assert layer.calls[0].kernel.arguments[-1] == activation_rounding(precision)
    assert layer.calls[1].kernel.arguments[0] == precision


@pytest.mark.parametrize("precision", [p for p in all_precisions() if p.kind == "fp8"], ids=Precision.describe)
def test_fp8_is_multiplied_as_floats(tiny_checkpoint, precision):
    """Inputs are rounded where the recipe says so, once for all matrices that read them."""
    model = lowered(coded_source(tiny_checkpoint("gqa"), precision))
    wanted = []
    for name in FLOAT:
        wanted += ["round_fp8", name] if name == "linear_float" and precision.activations else [name]
    assert kernels(model.layers[0].program) == wanted
    assert model.layers[0].program.calls[-1].kernel.arguments[0] == "fp8"


def without_rounding(structure: ir.Model) -> None:
    product = node_of(structure, "MatMul")
    product.replace_input_with(0, match_rounded_input(product.inputs[0]).source)


def other_table(structure: ir.Model) -> None:
    weight = next(match for node in structure.graph if (match := match_table_weight(node.outputs[0])))
    levels = weight.nodes[1].inputs[0]
    levels.const_value = ir.tensor(levels.const_value.numpy() * 2, name=levels.name)


def scales_of_another(structure: ir.Model) -> None:
    found = [match for node in structure.graph if (match := match_table_weight(node.outputs[0]))]
    found[1].nodes[3].replace_input_with(0, found[0].scales)


def wider_groups(structure: ir.Model) -> None:
    weight = next(match for node in structure.graph if (match := match_table_weight(node.outputs[0])))
    other = ir.Value(name="other_shape", const_value=ir.tensor([0, -1, 32], name="other_shape"))
    structure.graph.register_initializer(other)
    weight.nodes[2].replace_input_with(1, other)


NF4 = Precision("nf4", 16)
CODED_REFUSED = {
    "no rounding": (W8A8, without_rounding, "is rounded to nothing, its recipe says int8/token"),
    "coarser codes": (W8A8, set_attribute("QuantizeLinear", "output_dtype", int(ir.DataType.INT4)), "unknown|rounded"),
    "another table": (NF4, other_table, "Cast has to = 6"),
    "another scale": (NF4, scales_of_another, "of another weight"),
    "other groups": (NF4, wider_groups, "in groups of 32, stored as"),
}


@pytest.mark.parametrize("name", CODED_REFUSED)
def test_codes_and_roundings_of_another_form_are_refused(tiny_checkpoint, name):
    precision, damage, words = CODED_REFUSED[name]
    source = coded_source(tiny_checkpoint("gqa"), precision)
    with pytest.raises(UnsupportedError, match=words) as error:
        lowered(source, model=damaged(source.model, 1, damage))
    assert error.value.kind == "tvm.lowering"


def test_head_and_embedding_share_a_table_whatever_is_asked_of_the_input(tiny_checkpoint):
    source = coded_source(tiny_checkpoint("tied"), W8A8)
    model = lowered(source)
    assert model.embedding.stored[0].key == model.head.stored[-1].key
    assert model.embedding.stored[0].weight != model.head.stored[-1].weight


def test_epsilon_and_scale_come_from_the_graph(tiny_checkpoint):
    source = tvm_source(tiny_checkpoint("gqa"), "fp32")
    model = damaged(source.model, 1, set_attribute("Attention", "scale", 0.5))
    model = damaged(model, 1, set_attribute("RMSNormalization", "epsilon", 0.25, 1))
    calls = {
        call.kernel.factory: call.kernel.arguments for call in lowered(source, model=model).layers[1].program.calls
    }
    assert calls["rotary_cache"][-1] == 0.5
    assert calls["norm"][1] == 0.25


def test_a_rotary_table_of_one_layer_is_stored_beside_the_shared_one(tiny_checkpoint):
    source = tvm_source(tiny_checkpoint("mqa_three_layers"), "fp32")
    layers = list(source.model.layers)
    tables = {
        name: replace(weight, inverse_frequencies=weight.inverse_frequencies[::-1])
        for name, weight in layers[1].weights.items()
        if isinstance(weight, RotaryTable)
    }
    layers[1] = Slice("layer", 1, layers[1].structure, {**layers[1].weights, **tables})
    model = lowered(source, model=CanonicalModel(source.model.embedding, layers, source.model.head))
    assert model.layer_functions == ("layer",) * 3
    counted = Counter(stored.key for part in model.layers for stored in part.stored if "rotary" in stored.name)
    assert sorted(counted.values()) == [1, 1, 2, 2]
