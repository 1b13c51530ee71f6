"""The simulated rounding of activations equals what ONNX Runtime's MatMulNBits does."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from exporter.parity.activations import quantize_activations
from exporter.parity.metrics import relative_l2_error

# Equal codes leave float32 summation (measured 3e-7); one code flipped at a tie would show as about 1e-3.
SAME_CODES = 1e-5


def matmul_n_bits(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """x [M, K] times the transpose of int8 codes [N, K], by the kernel under test."""
    n, k = codes.shape
    blob = (codes.astype(np.int16) + 128).astype(np.uint8).reshape(n, k // group, group)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=8,
        block_size=group,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["M", n])],
        [numpy_helper.from_array(blob, "codes"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_equals_the_kernel(group: int, rows: int) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(rows, 256)).astype(np.float32)
    codes = generator.integers(-127, 128, (96, 256)).astype(np.int8)
    scales = generator.uniform(0.01, 0.02, (96, 256 // group)).astype(np.float32)
    weight = (codes.reshape(96, -1, group) * scales[..., None]).reshape(96, 256)
    rounded = quantize_activations(torch.from_numpy(x), group).numpy()
    found = matmul_n_bits(x, codes, scales, group)
    assert relative_l2_error(rounded @ weight.T, found) < SAME_CODES
    assert relative_l2_error(x @ weight.T, found) > 1e-3


def test_zeros_stay_zero() -> None:
    x = torch.zeros(2, 64)
    x[1, 40] = 3.0
    assert torch.equal(quantize_activations(x, 32), x)
