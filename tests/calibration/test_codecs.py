"""Packing over every code, against onnx's tensors and ONNX Runtime's own quantizer and kernels."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import _pybind_state as quantizer

from calibration import codecs
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows

TYPES = {
    ("int4", True): TensorProto.INT4,
    ("int4", False): TensorProto.UINT4,
    ("int6", True): TensorProto.INT8,
    ("int8", True): TensorProto.INT8,
    ("int8", False): TensorProto.UINT8,
}


def every_pair(kind: str, symmetric: bool) -> np.ndarray:
    """Each code beside each other one (for 6 and 8 bits: each beside its neighbours), [n, 32]."""
    low, high = {"int4": (-8, 8), "int6": (-32, 32), "int8": (-128, 128)}[kind]
    if not symmetric:
        low, high = 0, high - low
    codes = np.arange(low, high)
    pairs = np.stack(np.meshgrid(codes, codes), -1) if kind == "int4" else np.stack([codes, codes[::-1]], -1)
    return pairs.reshape(-1, 32).astype(np.int8 if symmetric else np.uint8)


def quantized(kind: str, symmetric: bool, codes: np.ndarray | None = None) -> QuantizedRows:
    codes = every_pair(kind, symmetric) if codes is None else codes
    rng = np.random.default_rng(3)
    groups = (len(codes), codes.shape[1] // 16)
    top = 16 if kind == "int4" else 256
    zeros = None if symmetric else rng.integers(0, top, groups).astype(np.uint8)
    scales = rng.choice([-1, 1], groups) * rng.uniform(0.5, 2, groups)
    return QuantizedRows(codes, scales.astype(np.float32), zeros, Precision(kind, 16, symmetric))


@pytest.mark.parametrize(("kind", "symmetric"), TYPES)
def test_onnx_reads_back_every_code(kind: str, symmetric: bool) -> None:
    rows = quantized(kind, symmetric)
    tensor = helper.make_tensor(
        "codes", TYPES[kind, symmetric], rows.codes.shape, codecs.to_onnx_raw(rows).tobytes(), raw=True
    )
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(rows.codes.dtype), rows.codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_nibbles_come_back(signed: bool, width: int) -> None:
    codes = every_pair("int4", signed)[:, :width]
    packed = codecs.pack_nibbles(codes)
    assert packed.shape == (len(codes), (width + 1) // 2)
    if width % 2:
        assert not (packed[:, -1] >> 4).any()
    unpacked = codecs.unpack_nibbles(packed, width, signed=signed)
    assert unpacked.dtype == codes.dtype
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize(("kind", "symmetric"), TYPES)
def test_blob_comes_back(kind: str, symmetric: bool) -> None:
    rows = quantized(kind, symmetric)
    blob, bits = codecs.to_matmul_nbits(rows), 4 if kind == "int4" else 8
    assert blob.shape == (len(rows.codes), 2, 16 * bits // 8)
    unsigned = codecs.from_matmul_nbits(blob, bits)
    offset = 2 ** (bits - 1) if symmetric else 0
    np.testing.assert_array_equal(unsigned.astype(int) - offset, rows.codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_same_bytes_as_onnxruntimes_quantizer(bits: int, symmetric: bool) -> None:
    """Weights that are exact codes of a known scale, quantized by ONNX Runtime, give the bytes we pack."""
    top, size, rng = 2**bits, 16, np.random.default_rng(5)
    shape = (6, 3, size)
    zeros = np.full(shape[:2], top // 2) if symmetric else rng.integers(0, top, shape[:2])
    codes = rng.integers(0, top, shape)
    codes[..., 0] = 0  # both ends of the range are in use, so that ONNX Runtime finds scale 1 and this zero point
    codes[..., 1] = top // 2 if symmetric else top - 1
    weights = (codes - zeros[..., None]).astype(np.float32).reshape(6, -1)
    blob, scales = np.zeros((6, 3, size * bits // 8), np.uint8), np.zeros((6, 3), np.float32)
    packed_zeros = np.zeros((6, (3 * bits + 7) // 8), np.uint8)
    quantize = quantizer.quantize_matmul_4bits if bits == 4 else quantizer.quantize_matmul_8bits
    quantize(blob, np.ascontiguousarray(weights.T), scales, packed_zeros, size, 6, 3 * size, symmetric)
    np.testing.assert_array_equal(scales, 1)
    ours = QuantizedRows(
        (codes - top // 2).astype(np.int8).reshape(6, -1) if symmetric else codes.astype(np.uint8).reshape(6, -1),
        scales,
        None if symmetric else zeros.astype(np.uint8),
        Precision(f"int{bits}", size, symmetric),
    )
    np.testing.assert_array_equal(codecs.to_matmul_nbits(ours), blob)
    if not symmetric:
        found = codecs.pack_zero_points(ours)
        assert found is not None and found.shape == packed_zeros.shape
        if bits == 4:
            # The nibble that pads a row of three is not read: ONNX Runtime leaves 8 there.
            found, packed_zeros = (codecs.unpack_nibbles(p, 3, signed=False) for p in (found, packed_zeros))
        np.testing.assert_array_equal(found, packed_zeros)


def run(node: object, constants: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> np.ndarray:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output], initializers), opset_imports=opsets, ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def blob_inputs(rows: QuantizedRows) -> dict[str, np.ndarray]:
    inputs = {"b": codecs.to_matmul_nbits(rows), "scales": rows.scales}
    zeros = codecs.pack_zero_points(rows)
    return inputs if zeros is None else {**inputs, "zeros": zeros}


@pytest.mark.parametrize(("kind", "symmetric"), TYPES)
def test_matmul_nbits_computes_with_every_code(kind: str, symmetric: bool) -> None:
    """x = identity: the kernel's output is the weight. Scales of both signs. One product a sum: exact to rounding."""
    rows = quantized(kind, symmetric)
    count, width = rows.codes.shape
    constants = blob_inputs(rows)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=count,
        bits=codecs.container_bits(rows.precision),
        block_size=16,
        accuracy_level=1,
    )
    y = run(node, constants, {"x": np.eye(width, dtype=np.float32)})
    np.testing.assert_allclose(y.T, rows.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "symmetric"), TYPES)
def test_gather_block_quantized_reads_the_same_bytes(kind: str, symmetric: bool) -> None:
    rows = quantized(kind, symmetric)
    constants = blob_inputs(rows)
    constants["b"] = constants["b"].reshape(len(rows.codes), -1)
    b, *others = constants
    node = helper.make_node(
        "GatherBlockQuantized",
        [b, "ids", *others],
        ["y"],
        domain="com.microsoft",
        bits=codecs.container_bits(rows.precision),
        block_size=16,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.arange(len(rows.codes), dtype=np.int64)[::-1].copy()
    np.testing.assert_array_equal(run(node, constants, {"ids": ids}), rows.dequantize()[ids])
