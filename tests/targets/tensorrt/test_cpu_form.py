"""bfloat16 and four-bit floats computed by ONNX Runtime's CPU kernels: bit for bit what the types say."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.core.errors import UnsupportedError
from targets.tensorrt.cpu_form import cpu_form

E2M1 = ml_dtypes.float4_e2m1fn
BF16 = ml_dtypes.bfloat16


def model(nodes, inputs, outputs, weights=(), domains=()) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 24), *(helper.make_opsetid(name, 1) for name in domains)]
    made = helper.make_model(graph, opset_imports=opsets)
    made.ir_version = 12
    return made


def run(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    import onnxruntime as ort

    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def raw(name: str, kind: int, dims: list[int], data: np.ndarray | bytes) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, dims, data if isinstance(data, bytes) else data.tobytes(), raw=True)


def packed(codes: np.ndarray) -> bytes:
    """Codes 0..15, two a byte, the first in the low half."""
    flat = codes.reshape(-1)
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def test_every_float16_graph_stays_as_it_is():
    proto = model(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", TensorProto.FLOAT16, [3])],
        [("y", TensorProto.FLOAT16, [3])],
    )
    before = proto.SerializeToString()
    assert cpu_form(proto) == ()
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(("operator", "function"), [("Add", np.add), ("Mul", np.multiply), ("Div", np.divide)])
def test_bf16_operators_round_once_to_nearest_even(operator, function):
    """Against ml_dtypes' own arithmetic, which computes in float32 and rounds."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(4096).astype(BF16) for _ in range(2))
    kinds = [("x", TensorProto.BFLOAT16, [4096]), ("y", TensorProto.BFLOAT16, [4096])]
    proto = model([helper.make_node(operator, ["x", "y"], ["z"])], kinds, [("z", TensorProto.BFLOAT16, [4096])])
    assert len(cpu_form(proto)) == 1
    (got,) = run(proto, x=x.astype(np.float32), y=y.astype(np.float32))
    np.testing.assert_array_equal(got, function(x, y).astype(np.float32))


def test_bf16_ties_go_to_even_and_weights_stay_narrow():
    """x + w in float32 lies between two values of bfloat16, exactly: 1 + 2^-8 goes down, 1 + 3 * 2^-8 up."""
    weight = raw("w", TensorProto.BFLOAT16, [2], np.array([2.0**-8, 3 * 2.0**-8], BF16))
    kinds = [("x", TensorProto.BFLOAT16, [2])]
    proto = model([helper.make_node("Add", ["x", "w"], ["z"])], kinds, [("z", TensorProto.BFLOAT16, [2])], [weight])
    cpu_form(proto)
    assert proto.graph.initializer[0].data_type == TensorProto.BFLOAT16
    (got,) = run(proto, x=np.ones(2, np.float32))
    np.testing.assert_array_equal(got, np.array([1.0, 1.0 + 2.0**-6], np.float32))


def test_rows_of_a_bf16_table_are_picked_before_they_are_widened():
    table = np.random.default_rng(0).standard_normal((8, 4)).astype(BF16)
    nodes = [helper.make_node("Gather", ["w", "i"], ["row"]), helper.make_node("Cast", ["row"], ["y"], to=1)]
    weight = raw("w", TensorProto.BFLOAT16, [8, 4], table)
    proto = model(nodes, [("i", TensorProto.INT64, [2])], [("y", TensorProto.FLOAT, [2, 4])], [weight])
    cpu_form(proto)
    assert [node.op_type for node in proto.graph.node] == ["Gather", "Cast", "Cast"]
    (got,) = run(proto, i=np.array([5, 0]))
    np.testing.assert_array_equal(got, table[[5, 0]].astype(np.float32))


def test_a_value_of_unknown_type_is_refused():
    nodes = [helper.make_node("Strange", ["x"], ["y"], domain="other"), helper.make_node("Neg", ["y"], ["z"])]
    kinds = [("x", TensorProto.BFLOAT16, [1])]
    proto = model(nodes, kinds, [("z", TensorProto.BFLOAT16, [1])], domains=("other",))
    with pytest.raises(UnsupportedError, match=r"value y \(of Strange\)"):
        cpu_form(proto)


@pytest.mark.parametrize("axis", [1, 0, -1])
def test_every_fp4_code_and_its_blocks_scale(axis):
    """W [32, 48] in all codes, scales of blocks of 16 along either axis, themselves from E4M3 and a global scale."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (32, 48)).astype(np.uint8)
    codes[:, :16] = np.arange(16)
    shape = (2, 48) if axis == 0 else (32, 3)
    scales = rng.uniform(0.5, 400, shape).astype(ml_dtypes.float8_e4m3fn)
    total = np.float32(0.013)
    nodes = [
        helper.make_node("DequantizeLinear", ["s8", "g"], ["s"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wide"], axis=axis, block_size=16),
        helper.make_node("Add", ["wide", "x"], ["y"]),
    ]
    weights = [
        raw("w", TensorProto.FLOAT4E2M1, [32, 48], packed(codes)),
        raw("s8", TensorProto.FLOAT8E4M3FN, list(shape), scales),
        raw("g", TensorProto.FLOAT, [], np.array(total)),
    ]
    proto = model(nodes, [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [32, 48])], weights)
    assert cpu_form(proto) == ("four-bit floats decoded, and rounded to, in float32",)
    (got,) = run(proto, x=np.zeros(1, np.float32))
    blocks = np.repeat(scales.astype(np.float32) * total, 16, axis=0 if axis == 0 else 1)
    np.testing.assert_array_equal(got, codes.view(E2M1).astype(np.float32) * blocks)


def dynamic(shape: list[int | str], kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """Quantized and dequantized again, as TensorRT wants NVFP4 activations."""
    block = {"axis": -1, "block_size": 16}
    nodes = [
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "g"], ["q", "s8"], domain="trt", scale_type=17, **block),
        helper.make_node("DequantizeLinear", ["s8", "g"], ["s"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["wide"], **block),
        helper.make_node("Identity", ["wide"], ["y"]),
    ]
    scale = raw("g", TensorProto.FLOAT, [], np.array(0.02, np.float32))
    return model(nodes, [("x", kind, shape)], [("y", TensorProto.FLOAT, shape)], [scale], ("trt",))


def reference(x: np.ndarray, total: np.float32) -> np.ndarray:
    """By ml_dtypes: scales to E4M3, quotients to E2M1."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
    scale = np.minimum(np.abs(blocks).max(-1) / np.float32(6) / total, np.float32(448))
    whole = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)[..., None] * total
    quotient = np.divide(blocks, whole, out=np.zeros_like(blocks), where=whole != 0)
    return (quotient.astype(E2M1).astype(np.float32) * whole).reshape(x.shape)


def test_nvfp4_activations_are_rounded_as_tensorrt_says():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 5, 64)) * rng.choice([1e-4, 1, 30, 3000], (3, 5, 1))).astype(np.float16)
    x[0, 0, :16] = 0  # a block without a scale
    proto = dynamic(["B", "S", 64])
    cpu_form(proto)
    (got,) = run(proto, x=x)
    np.testing.assert_array_equal(got, reference(x, np.float32(0.02)))


def test_ties_between_fp4_values_go_to_even_codes():
    """A block whose scale is exactly 0.02: its values are quotients, times that."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -2.5, -5.0, 0, 0, 0, 0], np.float32)
    proto = dynamic([1, 16], TensorProto.FLOAT)
    proto.graph.initializer[0].CopyFrom(raw("g", TensorProto.FLOAT, [], np.array(1, np.float32)))
    cpu_form(proto)
    (got,) = run(proto, x=ties[None])
    expected = [0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -2, -4, 0, 0, 0, 0]
    np.testing.assert_array_equal(got[0], np.array(expected, np.float32))


def test_bf16_and_fp4_together():
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(BF16)
    proto = dynamic([2, 32], TensorProto.BFLOAT16)
    assert len(cpu_form(proto)) == 2
    (got,) = run(proto, x=x.astype(np.float32))
    np.testing.assert_array_equal(got, reference(x, np.float32(0.02)))
