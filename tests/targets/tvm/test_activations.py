"""How activations are rounded before a matrix: what the target says, and that parity computes what kernels compute."""

import numpy as np
import pytest

from exporter.core.recipe import CHANNEL, FLOAT_KINDS, Precision, all_precisions
from targets.gpu_activations import refused_on_cpus
from targets.registry import get_target
from tests.targets.tvm.kernels.packed_rows import quantized, quantized_by_token, quantized_with_exponents


@pytest.mark.parametrize("group, symmetric", [(16, True), (32, False), (256, True)])
def test_int4_shares_exponents_and_int8_has_a_scale_for_each_group(group: int, symmetric: bool) -> None:
    tvm, onnxruntime = get_target("tvm").activation_rounding, get_target("onnxruntime").activation_rounding
    four, eight = (Precision(kind, group, symmetric) for kind in ("int4", "int8"))
    assert (tvm(four), tvm(eight)) == ("shared-exponent", "group")
    assert (onnxruntime(four), onnxruntime(eight)) == ("group", "group")


def test_what_a_recipe_asks_for_has_one_scale_a_token() -> None:
    tvm = get_target("tvm").activation_rounding
    precisions = [p for p in all_precisions() if p.activations and refused_on_cpus(p) is None]
    asked = {precision.describe(): tvm(precision) for precision in precisions}
    assert {how for name, how in asked.items() if "+int8" in name} == {"token"}
    assert {how for name, how in asked.items() if "+fp8" in name} == {"fp8-token"}
    assert {tvm(Precision(kind, group)) for kind, group in (("nf4", 64), ("nvfp4", 16), ("mxfp4", 32))} == {
        "shared-exponent"
    }
    assert tvm(Precision("fp8", CHANNEL)) is None


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_nothing_is_rounded_before_floats(kind: str) -> None:
    assert get_target("tvm").activation_rounding(Precision(kind)) is None
    assert get_target("onnxruntime").activation_rounding(Precision(kind)) is None


@pytest.mark.parametrize("group", [16, 32, 128])
def test_parity_rounds_as_kernels_do(group: int) -> None:
    """To the last bit, by the formulas that test_quantize.py holds kernels to; tiny and huge rows included."""
    torch = pytest.importorskip("torch")
    from exporter.parity.activations import round_activations

    random = np.random.default_rng(group)
    x = random.normal(size=(40, 256)) * random.lognormal(0, 3, (40, 256)) * 10.0 ** random.integers(-30, 20, (40, 1))
    x = x.astype(np.float32)
    codes, scales, _ = quantized(x, group)
    expected = (codes.reshape(40, -1, group) * scales[..., None]).reshape(x.shape)
    np.testing.assert_array_equal(round_activations(torch.from_numpy(x), group, "group").numpy(), expected)
    codes, shifts, _, bases = quantized_with_exponents(x, group)
    assert (bases == 0).any() and (bases > 0).any()
    scales = np.ldexp(bases[:, None], shifts >> 23)
    expected = (codes.reshape(40, -1, group) * scales[..., None]).reshape(x.shape)
    np.testing.assert_array_equal(round_activations(torch.from_numpy(x), group, "shared-exponent").numpy(), expected)
    codes, _, _, bases = quantized_by_token(x, group)
    found = round_activations(torch.from_numpy(x), group, "token").numpy()
    # Parity divides, kernels multiply by a reciprocal: another rounding of float32.
    expected = codes * np.ldexp(bases, 32)[:, None]
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=2.0**-79)
