"""The simulated roundings of activations: those of kernels, of NVFP4's definition, and of what recipes ask."""

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


def test_nvfp4_equals_the_definition() -> None:
    """Float64, types of ml_dtypes: a block's scale is E4M3(amax / 6 / global), its values E2M1(x / (scale global)).

    Values and the global scale have few digits, so that float32 and float64 agree on every quotient near a tie.
    """
    generator = np.random.default_rng(5)
    x = generator.integers(-(2**12), 2**12, (60, 96)) * 2.0 ** generator.integers(-12, 1, (60, 6)).repeat(16, axis=1)
    x[3, 16:32] = 0.0
    scale = 2.0**-2
    blocks = x.reshape(-1, 16)
    own = np.minimum(np.abs(blocks).max(1, keepdims=True) / 6 / scale, 448)
    own = own.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    codes = np.divide(blocks, own * scale, out=np.zeros_like(blocks), where=own > 0)
    rounded = np.clip(codes, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * own * scale
    found = round_activations(torch.from_numpy(x.astype(np.float32)), 16, "nvfp4", scale).numpy()
    assert (np.abs(blocks).max(1) > 6 * 448 * scale).any()  # something saturates
    np.testing.assert_array_equal(found, rounded.reshape(x.shape).astype(np.float32))


def test_nvfp4_halves_go_to_even_codes() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.3])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0.5])
    assert torch.equal(round_activations(x[None], 16, "nvfp4", 1.0), even[None])


def test_nvfp4_blocks_far_below_the_others_become_zero() -> None:
    """The least E4M3 scale is 2^-9, half of it rounds to zero: a block at that bound is lost, one above it is not."""
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 6 * 2.0**-10, 6 * 2.0**-10 * (1 + 2.0**-10)
    found = round_activations(x, 16, "nvfp4", 1.0)
    assert found[0, 0] == 0 and found[0, 16] > 0


@pytest.mark.parametrize("how", ["tensor", "fp8-tensor", "nvfp4"])
def test_a_scale_from_calibration_must_be_there(how: ActivationRounding) -> None:
    with pytest.raises(ValueError, match="calibration"):
        round_activations(torch.zeros(1, 16), 0, how)


@pytest.mark.parametrize("asked", [*ACTIVATIONS, ""])
def test_what_a_recipe_asks_is_simulated_as_asked(asked: str) -> None:
    kind = asked.partition("/")[0] or "int8"
    expected = {"int8/token": "token", "int8/tensor": "tensor", "fp8/token": "fp8-token", "fp8/tensor": "fp8-tensor"}
    found = asked_rounding(Precision(kind, 16 if kind == "nvfp4" else CHANNEL, activations=asked))
    assert found == expected.get(asked)  # graphs have no nodes for nvfp4/tensor


def test_int4_weights_may_have_inputs_in_fp8() -> None:
    assert asked_rounding(Precision("int4", 128, activations="fp8/tensor")) == "fp8-tensor"
