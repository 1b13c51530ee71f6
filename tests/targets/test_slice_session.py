"""SliceSession against ONNX's reference evaluator and against numpy."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from exporter.core.config import ModelConfig
from targets.onnxruntime.slice_session import SliceSession
from tests.support.canonical_llama import layer_structure
from tests.support.tiny import BASE

# float32 in both, sums of at most 128 terms: rounding only.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    from exporter.core.config import parse_config

    return parse_config({**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})


def layer_feeds(config: ModelConfig, structure: ir.Model, slots: int = 12) -> dict[str, np.ndarray]:
    """Seeded inputs: two rows that hold 3 and 5 positions and get 4 more."""
    random = np.random.default_rng(1)
    sizes = {"B": 2, "S": 4, "M": slots, "P": slots}
    feeds: dict[str, np.ndarray] = {}
    for value in structure.graph.inputs:
        shape = [sizes.get(str(d), d) for d in value.shape]
        feeds[value.name] = (random.standard_normal(shape) * 0.2).astype(np.float32)
    feeds["write_indices"] = np.array([3, 5], np.int64)
    feeds["nonpad_kv_seqlen"] = feeds["write_indices"] + 4
    feeds["position_ids"] = feeds["write_indices"][:, None] + np.arange(4)
    return feeds


def test_outputs_and_intermediate_values_match_the_reference(config):
    structure = layer_structure(config)
    feeds = layer_feeds(config, structure)
    session = SliceSession(structure)
    result = session.run(feeds)
    assert list(result) == ["hidden_out", "present_key", "present_value"]
    expected = ReferenceEvaluator(ir.to_proto(structure)).run(None, feeds)
    for got, want in zip(result.values(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=ROUNDING, atol=ROUNDING)
    inner = next(node.outputs[0].name for node in structure.graph if node.op_type == "Attention")
    fetched = session.run(feeds, fetch=[inner, "hidden_out"])
    assert fetched[inner].shape == (2, config.num_heads, 4, config.head_dim)
    np.testing.assert_array_equal(fetched["hidden_out"], result["hidden_out"])


def dequantize_structure(code: ir.DataType, asymmetric: bool) -> ir.Model:
    names = ["w.codes", "w.scales"] + (["w.zero_points"] if asymmetric else [])
    types = [code, ir.DataType.FLOAT, code]
    inputs = [
        ir.Value(name=name, shape=ir.Shape(["N", "K"]), type=ir.TensorType(kind))
        for name, kind in zip(names, types, strict=False)
    ]
    node = ir.node("DequantizeLinear", inputs, attributes={"axis": 1, "block_size": 16})
    node.outputs[0].name, node.outputs[0].type = "w", ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24}, name="w"), ir_version=11)


@pytest.mark.parametrize(
    ("code", "low", "high"),
    [("INT4", -8, 8), ("UINT4", 0, 16), ("INT8", -128, 128), ("UINT8", 0, 256)],
)
def test_every_code_dequantizes_exactly(code, low, high):
    asymmetric = low == 0
    codes = np.arange(3 * 32 * 16).reshape(3 * 16, 32) % (high - low) + low
    codes = codes.astype(np.uint8 if asymmetric else np.int8)
    scales = np.random.default_rng(0).standard_normal((48, 2)).astype(np.float32)
    constants = {"w.codes": codes, "w.scales": scales}
    zeros = np.zeros((48, 2), np.int64)
    if asymmetric:
        zeros = np.random.default_rng(1).integers(low, high, (48, 2))
        constants["w.zero_points"] = zeros.astype(np.uint8)
    session = SliceSession(dequantize_structure(ir.DataType[code], asymmetric), constants)
    want = (codes.astype(np.float32) - np.repeat(zeros, 16, 1).astype(np.float32)) * np.repeat(scales, 16, 1)
    np.testing.assert_array_equal(session.run({})["w"], want)


def test_bfloat16_goes_in_and_out():
    x = ir.Value(name="x", shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.BFLOAT16))
    cast = ir.node("Cast", [x], attributes={"to": int(ir.DataType.FLOAT)})
    back = ir.node("Cast", [cast.outputs[0]], attributes={"to": int(ir.DataType.BFLOAT16)})
    for node, name in ((cast, "wide"), (back, "narrow")):
        node.outputs[0].name = name
    model = ir.Model(
        ir.Graph([x], [cast.outputs[0]], nodes=[cast, back], opset_imports={"": 24}, name="c"), ir_version=11
    )
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    values = np.array([1.5, -2.0, 3e38, 1e-40], ml_dtypes.bfloat16)
    result = SliceSession(model).run({"x": values}, fetch=["wide", "narrow"])
    np.testing.assert_array_equal(result["wide"], values.astype(np.float32))
    assert result["narrow"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result["narrow"].view(np.uint16), values.view(np.uint16))


def test_empty_inputs_run():
    x = ir.Value(name="x", shape=ir.Shape(["N", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Add", [x, x])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="e"), ir_version=11)
    assert SliceSession(model).run({"x": np.zeros((0, 4), np.float32)})["y"].shape == (0, 4)


def test_wrong_inputs_are_named(config):
    structure = layer_structure(config)
    session, feeds = SliceSession(structure), layer_feeds(config, structure)
    with pytest.raises(KeyError, match="past_key"):
        session.run({name: array for name, array in feeds.items() if name != "past_key"})
    with pytest.raises(KeyError, match="stray"):
        session.run({**feeds, "stray": np.zeros(1, np.float32)})
    with pytest.raises(KeyError, match="nowhere"):
        session.run(feeds, fetch=["nowhere"])
    with pytest.raises(TypeError, match="hidden"):
        session.run({**feeds, "hidden": feeds["hidden"].astype(np.float64)})
