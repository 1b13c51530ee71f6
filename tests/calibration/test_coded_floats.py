"""Rounding to nearest in fp8, nf4, nvfp4 and mxfp4: plain scales by their formulas, and what the search wins."""

import ml_dtypes
import numpy as np
import pytest
import torch

from calibration.coded_floats import magnitude, quantize_coded_floats, wants_tensor_amax
from calibration.rtn import absmax_rows, quantize_rows
from exporter.core.number_formats import NF4_LEVELS, decode_table
from exporter.core.recipe import CHANNEL, TENSOR, Precision, all_precisions

FLOATS = [p for p in all_precisions() if p.is_coded and not p.is_integer and not p.activations]
FOUR_BIT = [p for p in FLOATS if p.bits == 4]
SPREADS = ("gauss", "heavy", "sparse")


def weights(spread: str, shape: tuple[int, int] = (48, 512)) -> np.ndarray:
    rng = np.random.default_rng(9)
    values = rng.standard_t(3, shape) if spread == "heavy" else rng.standard_normal(shape)
    if spread == "sparse":
        values *= rng.random(shape) < 0.1
    scaled: np.ndarray = (0.02 * values).astype(np.float32)
    return scaled


def squared_errors(values: np.ndarray, precision: Precision, found: np.ndarray) -> np.ndarray:
    """float64 [n, groups]."""
    error: np.ndarray = (values.astype(np.float64) - found.astype(np.float64)) ** 2
    summed: np.ndarray = error.reshape(len(values), precision.groups(values.shape[1]), -1).sum(-1)
    return summed


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("group", [TENSOR, CHANNEL])
def test_fp8_is_amax_over_448_and_torchs_rounding(spread: str, group: int) -> None:
    """The scales that modelopt computes: max|w| / 448 in float32, of the matrix or of each row."""
    values, precision = weights(spread), Precision("fp8", group)
    for quantize in (quantize_rows, absmax_rows):
        rows = quantize(values, precision)
        amax = np.abs(values).max(keepdims=True) if group == TENSOR else np.abs(values).max(axis=1, keepdims=True)
        expected = np.broadcast_to(amax / np.float32(448), (len(values), 1))
        np.testing.assert_array_equal(rows.scales, expected)
        codes = torch.from_numpy(values / expected).to(torch.float8_e4m3fn)
        np.testing.assert_array_equal(rows.codes, codes.view(torch.uint8).numpy())
        np.testing.assert_array_equal(rows.dequantize(), codes.float().numpy() * expected)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("group", [16, 64])
def test_plain_nf4_is_amax_and_the_nearest_level(spread: str, group: int) -> None:
    values, precision = weights(spread), Precision("nf4", group)
    rows = absmax_rows(values, precision)
    groups = values.reshape(-1, group)
    amax = np.abs(groups).max(axis=1, keepdims=True)
    expected = np.where(amax == 0, 1, amax)
    np.testing.assert_array_equal(rows.scales.reshape(-1, 1), expected)
    distances = np.abs((groups / expected).astype(np.float64)[:, :, None] - np.array(NF4_LEVELS, np.float32))
    np.testing.assert_array_equal(rows.codes.reshape(-1, group), distances.argmin(-1))


@pytest.mark.parametrize("spread", SPREADS)
def test_plain_nvfp4_is_what_modelopt_computes(spread: str) -> None:
    """NVFP4QTensor: matrix scale amax / (6 * 448), a group's scale E4M3(amax / (6 * matrix scale)), 1 for zeros."""
    values = weights(spread)
    rows = absmax_rows(values, Precision("nvfp4", 16))
    groups = torch.from_numpy(values).view(-1, 16)
    matrix = groups.abs().max() / (6.0 * 448.0)
    scales = groups.abs().amax(-1, keepdim=True) / 6.0 / matrix
    scales[scales == 0] = 1.0
    # modelopt clamps to the range of E4M3; below half its least value that is zero there, and the least one here.
    effective = scales.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * matrix
    np.testing.assert_array_equal(rows.scales.reshape(-1, 1), effective.numpy())
    codes = (groups / effective).numpy().astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(rows.codes.reshape(-1, 16), codes.view(np.uint8))


@pytest.mark.parametrize("spread", SPREADS)
def test_mxfp4_is_the_standards(spread: str) -> None:
    """OCP MX 1.0, section 6.3: the largest power of two not above max|w|, divided by that in E2M1's largest value."""
    values = weights(spread)
    rows = quantize_rows(values, Precision("mxfp4", 32))
    groups = values.reshape(-1, 32)
    amax = np.abs(groups).max(axis=1, keepdims=True).astype(np.float64)
    with np.errstate(divide="ignore"):
        expected = np.where(amax == 0, 2.0**-2, 2.0 ** (np.floor(np.log2(amax)) - 2))
    kept = amax[:, 0] > 0
    np.testing.assert_array_equal(rows.scales.reshape(-1, 1)[kept], expected[kept])
    codes = np.clip(groups / expected, -6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(rows.codes.reshape(-1, 32)[kept], codes.view(np.uint8)[kept])
    assert not (rows.codes.reshape(-1, 32)[~kept] & 7).any()  # 8 is -0


@pytest.mark.parametrize("precision", FOUR_BIT, ids=Precision.describe)
@pytest.mark.parametrize("spread", SPREADS)
def test_the_search_is_never_worse_in_any_group(spread: str, precision: Precision) -> None:
    """Up to what float16 takes from nf4's scales, 2^-11 of the values v: sqrt(e) grows by at most 2^-11 sqrt(v v)."""
    values = weights(spread)
    plain = squared_errors(values, precision, absmax_rows(values, precision).dequantize())
    rows = quantize_rows(values, precision)
    found = squared_errors(values, precision, rows.dequantize())
    restored = squared_errors(values, precision, values - rows.dequantize())
    rounding = 2.0**-11 if precision.kind == "nf4" else 2.0**-22
    normal = rows.scales >= (2.0**-14 if precision.kind == "nf4" else 0)  # float16 loses digits below
    assert (np.sqrt(found) <= np.sqrt(plain) + rounding * np.sqrt(restored))[normal].all()
    assert normal.mean() > 0.9


@pytest.mark.parametrize(("kind", "group", "most"), [("nf4", 64, 0.88), ("nvfp4", 16, 0.79)])
def test_the_search_lowers_the_squared_error(kind: str, group: int, most: float) -> None:
    """On Gaussian weights, as docs/recipes.md says."""
    values, precision = weights("gauss", (256, 1024)), Precision(kind, group)
    plain = squared_errors(values, precision, absmax_rows(values, precision).dequantize()).sum()
    assert squared_errors(values, precision, quantize_rows(values, precision).dequantize()).sum() < most * plain


@pytest.mark.parametrize("precision", FLOATS, ids=Precision.describe)
def test_every_code_is_the_nearest_for_its_scale(precision: Precision) -> None:
    """No other code of the table lies nearer, in float64."""
    values = weights("heavy", (4, 256))
    rows = quantize_rows(values, precision)
    table = decode_table(precision.kind).astype(np.float64)
    table = table[np.isfinite(table)]
    scales = np.repeat(rows.scales, precision.group_of(256), axis=1).astype(np.float64)
    nearest = np.abs(values.astype(np.float64)[:, :, None] - table * scales[:, :, None]).min(-1)
    # The quotient w / scale is rounded to float32 before it is compared: 2^-24 of the weight.
    np.testing.assert_array_less(
        np.abs(values - rows.dequantize().astype(np.float64)), nearest + 1.2e-7 * np.abs(values) + 1e-30
    )


@pytest.mark.parametrize("precision", FLOATS, ids=Precision.describe)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-9, 1.0, 1e9, 3e38])
def test_edges_of_float32(precision: Precision, size: float) -> None:
    """Tiny and huge weights keep their relative error; nothing becomes infinite."""
    values: np.ndarray = np.clip(weights("gauss", (8, 256)) / np.float32(0.07), -1, 1) * np.float32(size)
    rows = quantize_rows(values, precision)
    found = rows.dequantize()
    assert np.isfinite(found).all() and np.isfinite(rows.scales).all() and (rows.scales > 0).all()
    # Scales stop at 2^-126; below some 2^-120 the steps grow coarse and weights may become zero.
    allowed = 0.03 if size > 1e-30 else 1.0
    errors = ((found.astype(np.float64) - values) ** 2).sum()
    assert errors <= allowed * (values.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("precision", FLOATS, ids=Precision.describe)
def test_zeros_stay_zeros(precision: Precision) -> None:
    values = weights("gauss", (4, 512))
    values[1] = 0
    rows = quantize_rows(values, precision)
    assert not rows.dequantize()[1].any() and (rows.scales > 0).all()
    assert not quantize_rows(np.zeros((2, 256), np.float32), precision).dequantize().any()


@pytest.mark.parametrize("precision", FLOATS, ids=Precision.describe)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_types_are_rounded_as_their_float32_values(precision: Precision, dtype: type) -> None:
    values: np.ndarray = weights("gauss").astype(dtype)
    stored, wide = quantize_rows(values, precision), quantize_rows(values.astype(np.float32), precision)
    np.testing.assert_array_equal(stored.codes, wide.codes)
    np.testing.assert_array_equal(stored.scales, wide.scales)


@pytest.mark.parametrize("precision", FLOATS, ids=Precision.describe)
def test_rows_do_not_depend_on_their_neighbours(precision: Precision) -> None:
    """Given the matrix's maximum, where it matters."""
    values = weights("heavy", (20, 1024))
    amax = magnitude(values)
    whole = quantize_rows(values, precision, amax)
    for start, stop in ((0, 3), (3, 20), (7, 8)):
        part = quantize_rows(values[start:stop], precision, amax)
        np.testing.assert_array_equal(part.codes, whole.codes[start:stop])
        np.testing.assert_array_equal(part.scales, whole.scales[start:stop])
    assert quantize_coded_floats(values[:0], precision, amax).codes.shape == (0, 1024)


def test_what_needs_the_matrixs_maximum() -> None:
    wanting = {precision.describe() for precision in all_precisions() if wants_tensor_amax(precision)}
    assert {p.partition("+")[0] for p in wanting} == {"fp8/tensor", "nvfp4"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_magnitude(dtype: type) -> None:
    values: np.ndarray = weights("heavy").astype(dtype)
    assert magnitude(values) == float(np.abs(values.astype(np.float32)).max())
    assert magnitude(values[:, ::3]) == float(np.abs(values[:, ::3].astype(np.float32)).max())
    assert magnitude(values[:0]) == 0.0 and magnitude(-np.zeros((2, 2), dtype)) == 0.0
