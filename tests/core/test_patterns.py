"""Rounded inputs and table weights: found where they are inserted, and not in what merely looks like them."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from calibration.insert_precision import apply_recipe
from exporter.core.canonical import Slice
from exporter.core.recipe import ACTIVATIONS, Precision, Recipe
from exporter.core.rounded_input import UNROUNDED, match_rounded_input
from exporter.core.table_weight import match_table_weight
from tests.support.canonical_llama import canonical_llama
from tests.support.traced import tiny_config

CONFIG = tiny_config("biases")
SCALES = {f"model.layers.{i}.{name}": 0.01 for i in range(2) for name in CONFIG.linear_shapes} | {"lm_head": 0.01}


def head(precision: Precision) -> Slice:
    recipe = Recipe("test", precision, precision, precision.weight_only)
    return apply_recipe(canonical_llama(CONFIG, 64), recipe, CONFIG, SCALES).head


def rounded(activations: str) -> Slice:
    return head(Precision("int8" if activations.startswith("int8") else "fp8", -1, activations=activations))


def node(piece: Slice, kind: str) -> ir.Node:
    return next(each for each in piece.structure.graph if each.op_type == kind)


def product(piece: Slice) -> ir.Node:
    return node(piece, "MatMul")


def other(piece: Slice, value: ir.Value, number: float) -> None:
    """Another constant in the place of one."""
    shape = list(value.const_value.numpy().shape)  # type: ignore[union-attr]
    value.const_value = ir.tensor(np.full(shape, number, value.const_value.numpy().dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("activations", [each for each in ACTIVATIONS if each not in UNROUNDED])
def test_a_rounding_is_found_whole(activations: str) -> None:
    piece = rounded(activations)
    found = match_rounded_input(product(piece).inputs[0])
    assert found is not None and found.activations == activations
    assert (found.kind, found.per_token) == (activations.split("/")[0], activations.endswith("token"))
    normed = node(piece, "RMSNormalization").outputs[0]
    assert found.source is normed
    kinds = [each.op_type for each in found.nodes]
    steps = [] if activations.endswith("tensor") else ["Abs", "ReduceMax", "Div", "Max"]
    assert kinds == [*steps, "QuantizeLinear", "DequantizeLinear"]
    name = found.scale.name if found.scale is not None else None
    assert name == ("lm_head.weight.input_scale" if activations.endswith("tensor") else None)
    order = list(piece.structure.graph)
    assert [order.index(each) for each in found.nodes] == sorted(order.index(each) for each in found.nodes)


def test_other_values_are_no_roundings() -> None:
    piece = head(Precision("int8", 32))
    assert match_rounded_input(product(piece).inputs[0]) is None
    # A dequantized weight is not an input that was rounded.
    assert match_rounded_input(node(piece, "DequantizeLinear").outputs[0]) is None
    assert match_rounded_input(piece.structure.graph.inputs[0]) is None and match_rounded_input(None) is None


def _attribute(kind: str, name: str, value: int) -> Callable[[Slice], None]:
    def change(piece: Slice) -> None:
        # The DequantizeLinear of the input is the one with a produced value before it.
        found = match_rounded_input(product(piece).inputs[0])
        assert found is not None
        target = next(each for each in found.nodes if each.op_type == kind)
        target.attributes[name] = ir.AttrInt64(name, value)

    return change


def _constant(kind: str, value: float) -> Callable[[Slice], None]:
    return lambda piece: other(piece, node(piece, kind).inputs[1], value)  # type: ignore[arg-type]


def _codes_used_twice(piece: Slice) -> None:
    codes = node(piece, "QuantizeLinear").outputs[0]
    piece.structure.graph.append(ir.node("Cast", [codes], attributes={"to": 1}))


def _scale_of_another_value(piece: Slice) -> None:
    node(piece, "Abs").replace_input_with(0, piece.structure.graph.inputs[0])


def _two_scales(piece: Slice) -> None:
    quantize = node(piece, "QuantizeLinear")
    scale = quantize.inputs[1]
    assert scale is not None
    copy = ir.node("Cast", [scale], attributes={"to": 1})
    piece.structure.graph.insert_before(quantize, copy)
    quantize.replace_input_with(1, copy.outputs[0])


def _with_zero_point(piece: Slice) -> None:
    quantize = node(piece, "QuantizeLinear")
    quantize.resize_inputs(3)
    quantize.replace_input_with(2, ir.Value(name="zero", const_value=ir.tensor(np.array([1], np.int8))))


@pytest.mark.parametrize(
    ("activations", "change"),
    [
        ("int8/token", _constant("Div", 128.0)),
        ("fp8/token", _constant("Div", 127.0)),
        ("int8/token", _constant("Max", 1.0)),
        ("int8/token", _constant("ReduceMax", 1)),
        ("int8/token", _attribute("ReduceMax", "keepdims", 0)),
        ("int8/token", _attribute("QuantizeLinear", "axis", 1)),
        ("int8/token", _attribute("DequantizeLinear", "axis", 0)),
        ("int8/token", _attribute("DequantizeLinear", "block_size", 0)),
        ("int8/tensor", _attribute("QuantizeLinear", "block_size", 32)),
        ("int8/tensor", _attribute("QuantizeLinear", "output_dtype", int(ir.DataType.UINT8))),
        ("fp8/tensor", _attribute("QuantizeLinear", "output_dtype", int(ir.DataType.FLOAT8E5M2))),
        ("fp8/tensor", _attribute("QuantizeLinear", "saturate", 0)),
        ("int8/token", _codes_used_twice),
        ("int8/tensor", _codes_used_twice),
        ("int8/token", _scale_of_another_value),
        ("int8/token", _two_scales),
        ("int8/tensor", _two_scales),
        ("int8/tensor", _with_zero_point),
    ],
)
def test_near_misses_are_no_roundings(activations: str, change: Callable[[Slice], None]) -> None:
    piece = rounded(activations)
    assert match_rounded_input(product(piece).inputs[0]) is not None
    change(piece)
    assert match_rounded_input(product(piece).inputs[0]) is None


TABLE_WEIGHTS = [Precision("nf4", 32), Precision("nf4", 64), Precision("nvfp4", 16), Precision("mxfp4", 32)]


def weight_of(piece: Slice) -> ir.Value:
    value = node(piece, "Transpose").inputs[0]
    assert value is not None
    return value


@pytest.mark.parametrize("precision", TABLE_WEIGHTS, ids=Precision.describe)
def test_a_table_weight_is_found_whole(precision: Precision) -> None:
    piece = head(precision)
    found = match_table_weight(weight_of(piece))
    assert found is not None
    assert (found.codes.name, found.scales.name) == ("lm_head.weight.codes", "lm_head.weight.scales")
    assert (found.table, found.group) == ("nf4" if precision.kind == "nf4" else "e2m1", precision.group_size)
    assert [each.op_type for each in found.nodes] == ["Cast", "Gather", "Reshape", "Reshape", "Mul", "Reshape"]


def test_other_weights_are_no_table_weights() -> None:
    for precision in (Precision("int4", 32), Precision("fp8", -1), Precision("bf16"), Precision()):
        assert match_table_weight(weight_of(head(precision))) is None
    assert match_table_weight(None) is None


def _other_table(piece: Slice) -> None:
    found = match_table_weight(weight_of(piece))
    assert found is not None
    levels = found.nodes[1].inputs[0]
    assert levels is not None and levels.const_value is not None
    levels.const_value = ir.tensor(levels.const_value.numpy()[::-1].copy())


def _other_axis(piece: Slice) -> None:
    found = match_table_weight(weight_of(piece))
    assert found is not None
    found.nodes[1].attributes["axis"] = ir.AttrInt64("axis", 1)


def _other_shape(piece: Slice) -> None:
    found = match_table_weight(weight_of(piece))
    assert found is not None
    other(piece, found.nodes[2].inputs[1], 4)  # type: ignore[arg-type]


def _values_used_twice(piece: Slice) -> None:
    found = match_table_weight(weight_of(piece))
    assert found is not None
    piece.structure.graph.append(ir.node("Abs", [found.nodes[1].outputs[0]]))


@pytest.mark.parametrize("change", [_other_table, _other_axis, _other_shape, _values_used_twice])
def test_near_misses_are_no_table_weights(change: Callable[[Slice], None]) -> None:
    piece = head(Precision("nf4", 32))
    change(piece)
    assert match_table_weight(weight_of(piece)) is None
