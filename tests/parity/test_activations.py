"""The simulated roundings of activations: that of ONNX Runtime's MatMulNBits, and that of shared exponents."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from exporter.core.recipe import ACTIVATIONS, CHANNEL, Precision
from exporter.parity.activations import asked_rounding, round_activations
from exporter.parity.metrics import relative_l2_error
from targets.base import ActivationRounding

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
    rounded = round_activations(torch.from_numpy(x), group, "group").numpy()
    found = matmul_n_bits(x, codes, scales, group)
    assert relative_l2_error(rounded @ weight.T, found) < SAME_CODES
    assert relative_l2_error(x @ weight.T, found) > 1e-3


def test_shared_exponents_are_powers_of_two_beside_the_largest_of_the_row() -> None:
    """Against exact arithmetic on values whose quotients are exact: base 1, one scale a group."""
    x = torch.zeros(2, 128)
    x[0, :32:8] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # the row's largest: steps of 1, ties to even
    x[0, 32:34] = torch.tensor([31.75, 0.375])  # a quarter of it: steps of 1/4
    x[0, 64:66] = torch.tensor([-31.8125, 0.375])  # just above a quarter: steps of 1/2
    x[0, 96:98] = torch.tensor([2.0**-30, 2.0**-19])  # the least step is 2^-24
    x[1, 0] = 2.0**-81  # nothing
    expected = torch.zeros(2, 128)
    expected[0, :32:8] = torch.tensor([127.0, 0.0, 2.0, -2.0])
    expected[0, 32:34] = torch.tensor([31.75, 0.5])
    expected[0, 64:66] = torch.tensor([-32.0, 0.5])
    expected[0, 96:98] = torch.tensor([0.0, 2.0**-19])
    assert torch.equal(round_activations(x, 32, "shared-exponent"), expected)


@pytest.mark.parametrize("group", [16, 32, 128])
def test_shared_exponents_lose_at_most_half_a_step_of_twice_the_group_s_own(group: int) -> None:
    generator = np.random.default_rng(group)
    x = generator.normal(size=(50, 256)) * generator.lognormal(0, 2, (50, 256))
    x = torch.from_numpy(x.astype(np.float32))
    error = (round_activations(x, group, "shared-exponent") - x).reshape(50, -1, group).abs().amax(-1)
    largest = x.reshape(50, -1, group).abs().amax(-1)
    assert (error <= largest / 127 * (1 + 1e-6)).all() and error.max() > 0


@pytest.mark.parametrize("how", ["group", "shared-exponent"])
def test_zeros_stay_zero(how: ActivationRounding) -> None:
    x = torch.zeros(2, 64)
    x[1, 40] = 3.0
    assert torch.equal(round_activations(x, 32, how), x)


def test_a_token_or_all_of_them_share_a_scale() -> None:
    """Against NumPy: int8 codes by rint, E4M3 codes by ml_dtypes."""
    generator = np.random.default_rng(3)
    x = (generator.normal(size=(40, 96)) * generator.lognormal(0, 2, (40, 1))).astype(np.float32)
    x[7] = 0.0
    largest = np.abs(x).max(-1, keepdims=True)
    expected = {}
    for how, top, codes in (("token", 127, np.rint), ("fp8-token", 448, e4m3)):
        scale = np.where(largest > 0, largest / np.float32(top), np.float32(1))
        expected[how] = codes(x / scale) * scale
    static = np.float32(0.05)
    expected["tensor"] = np.clip(np.rint(x / static), -128, 127) * static
    expected["fp8-tensor"] = e4m3(np.clip(x / static, -448, 448)) * static
    for how, values in expected.items():
        found = round_activations(torch.from_numpy(x), 0, how, float(static))  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.numpy(), values.astype(np.float32), err_msg=how)
    assert np.abs(x).max() > 448 * static  # both static roundings had something to saturate


def e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def test_a_scale_from_calibration_must_be_there() -> None:
    with pytest.raises(ValueError, match="calibration"):
        round_activations(torch.zeros(1, 4), 0, "tensor")


@pytest.mark.parametrize("asked", [*ACTIVATIONS, ""])
def test_what_a_recipe_asks_is_simulated_as_asked(asked: str) -> None:
    kind = "fp8" if asked.startswith("fp8") else "int8"
    expected = {"int8/token": "token", "int8/tensor": "tensor", "fp8/token": "fp8-token", "fp8/tensor": "fp8-tensor"}
    assert asked_rounding(Precision(kind, CHANNEL, activations=asked)) == expected.get(asked)
