"""Rounding to nearest: against plain rounding and an exhaustive search, in every group; and at the edges of float32."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from calibration import half_scales, rtn
from calibration.rtn import absmax_rows, quantize_rows
from exporter.core.recipe import CHANNEL, GROUP_SIZES, Precision

FLOAT32_MAX = np.finfo(np.float32).max
WAYS = [("int4", True), ("int4", False), ("int6", True), ("int8", True), ("int8", False)]
# Errors are compared in units of the group's sum of squares. A scale rounded to float16 moves by 2^-12, the error e of
# another scale than the best one by up to 2 * 2^-12 * sqrt(e): a plain scale may be lucky. 5e-6 measured.
ROUNDING = 1e-5


def weights(kind: str, width: int = 512, rows: int = 64) -> np.ndarray:
    rng = np.random.default_rng(7)
    draw = {
        "gauss": lambda: rng.standard_normal((rows, width)),
        "heavy": lambda: rng.standard_t(4, (rows, width)),
        "laplace": lambda: rng.laplace(size=(rows, width)),
        "one_sided": lambda: rng.exponential(size=(rows, width)),
        "integers": lambda: rng.integers(-8, 8, (rows, width)) * 0.25,
        "sparse": lambda: rng.standard_normal((rows, width)) * (rng.random((rows, width)) < 0.05),
    }
    return (draw[kind]() * 0.02).astype(np.float32)


KINDS = ("gauss", "heavy", "laplace", "one_sided", "integers", "sparse")


def group_errors(values: np.ndarray, restored: np.ndarray, size: int) -> np.ndarray:
    """Sum of squared errors of each group relative to its sum of squares (0 for a group of zeros)."""
    wide, back = (a.astype(np.float64).reshape(-1, size) for a in (values, restored))
    squares = (wide**2).sum(1)
    return ((wide - back) ** 2).sum(1) / np.where(squares == 0, 1, squares)


def sign_trick(values: np.ndarray, size: int, half: int) -> np.ndarray:
    """Plain rounding as onnxruntime and llama.cpp's Q4_0 do it: the largest weight becomes code -8, or -half."""
    groups = values.astype(np.float64).reshape(-1, size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    scale = np.where(largest == 0, 1, largest) / -half
    return (np.clip(np.rint(groups / scale), -half, half - 1) * scale).reshape(values.shape)


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_plain_rounding_in_any_group(kind: str, size: int) -> None:
    values = weights(kind)
    for precision in (Precision("int4", size), Precision("int4", size, symmetric=False), Precision("int6", size)):
        found = group_errors(values, quantize_rows(values, precision).dequantize(), size)
        plain = [group_errors(values, absmax_rows(values, precision).dequantize(), size)]
        if precision.symmetric:
            plain.append(group_errors(values, sign_trick(values, size, 1 << (precision.bits - 1)), size))
        excess = found - np.min(plain, axis=0)
        assert excess.max() <= ROUNDING, f"group {excess.argmax()} is worse by {excess.max():.3g} of its squares"


def exhaustive_symmetric(values: np.ndarray, size: int) -> np.ndarray:
    """Groups below 64 are searched without steps that clip the largest weight, as `calibration.rtn` explains."""
    groups = values.astype(np.float64).reshape(-1, size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    best = np.full(len(groups), np.inf)
    for step in np.arange(6.5, 8.01 if size < 64 else 13, 0.1):
        for sign in (-1, 1):
            codes = np.clip(np.rint(groups * (sign * step / largest)), -8, 7)
            scale = (codes * groups).sum(1, keepdims=True) / (codes**2).sum(1, keepdims=True)
            best = np.minimum(best, ((groups - codes * scale) ** 2).sum(1))
    return best


def exhaustive_asymmetric(values: np.ndarray, size: int) -> np.ndarray:
    groups = values.astype(np.float64).reshape(-1, size)
    span = np.maximum(groups.max(1, keepdims=True), 0) - np.minimum(groups.min(1, keepdims=True), 0)
    best = np.full(len(groups), np.inf)
    for step in np.arange(12, 22, 0.25):
        for zero in range(16):
            codes = np.clip(np.rint(groups * step / span) + zero, 0, 15) - zero
            squares = np.maximum((codes**2).sum(1, keepdims=True), 1)
            scale = (codes * groups).sum(1, keepdims=True) / squares
            best = np.minimum(best, ((groups - codes * scale) ** 2).sum(1))
    return best


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("kind", ["gauss", "heavy", "laplace"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_close_to_an_exhaustive_search(kind: str, size: int, symmetric: bool) -> None:
    """Within 2.5 % of the least error any scale (and zero point) can give; the steps were chosen for 1.2 %."""
    values = weights(kind, rows=32)
    best = (exhaustive_symmetric if symmetric else exhaustive_asymmetric)(values, size)
    restored = quantize_rows(values, Precision("int4", size, symmetric)).dequantize()
    assert np.sum((values.astype(np.float64) - restored) ** 2) <= 1.025 * best.sum()


@pytest.mark.parametrize(("precision", "symmetric"), [way for way in WAYS if way[0] != "int6"])
@pytest.mark.parametrize("width", [512, 176, 75])
def test_one_scale_a_row_is_a_group_as_wide(precision: str, symmetric: bool, width: int) -> None:
    """Widths that no power of two divides, too: minimum and maximum are those of the row."""
    values = weights("heavy", width)
    rows = quantize_rows(values, Precision(precision, CHANNEL, symmetric))
    assert rows.scales.shape == (64, 1) and rows.codes.shape == values.shape
    plain = absmax_rows(values, Precision(precision, CHANNEL, symmetric))
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    top = 2.0 ** (8 if precision == "int8" else 4) - 1
    expected = (high - low) / top if not symmetric else np.abs(values).max(1) / (top // 2)
    np.testing.assert_allclose(plain.scales[:, 0], expected, rtol=2.0**-10)
    errors = [group_errors(values, each.dequantize(), width) for each in (rows, plain)]
    assert (errors[0] <= errors[1] + ROUNDING).all()


@pytest.mark.parametrize("kind", ["gauss", "heavy", "laplace"])
def test_rows_are_clipped_farther_than_groups(kind: str) -> None:
    """On rows of 2048 within 2.5 % of an exhaustive search, as groups are; heavy tails go beyond that one's steps."""
    values = weights(kind, 2048, rows=16)
    best = exhaustive_symmetric(values, 2048).sum()
    restored = quantize_rows(values, Precision("int4", CHANNEL)).dequantize()
    assert np.sum((values.astype(np.float64) - restored) ** 2) <= 1.025 * best


def test_int6_takes_all_codes_and_off_the_squared_error() -> None:
    """11 % less than plain rounding with the sign trick on Gaussian weights in groups of 32; 1/15 of that of int4."""
    values = weights("gauss")
    rows = quantize_rows(values, Precision("int6", 32))
    assert rows.codes.dtype == np.int8 and rows.zero_points is None
    assert np.unique(rows.codes).tolist() == list(range(-32, 32))
    found = group_errors(values, rows.dequantize(), 32).mean()
    assert found < 0.91 * group_errors(values, sign_trick(values, 32, 32), 32).mean()
    assert found < group_errors(values, quantize_rows(values, Precision("int4", 32)).dequantize(), 32).mean() / 14


@pytest.mark.parametrize("size", [16, 32, 128])
def test_int8_rounds_to_the_nearest_code(size: int) -> None:
    values = weights("gauss")
    for symmetric in (True, False):
        rows = quantize_rows(values, Precision("int8", size, symmetric))
        half = np.repeat(np.abs(rows.scales), size, axis=1) / 2
        # With a zero point the range's ends may lie half a code further out, by its own rounding.
        slack = 1.00001 if symmetric else 2.00001
        assert (np.abs(rows.dequantize() - values) <= half * slack).all()
        assert rows.codes.dtype == (np.int8 if symmetric else np.uint8)


def test_symmetric_int8_uses_amax_over_127() -> None:
    values = weights("gauss")
    rows = quantize_rows(values, Precision("int8", 64))
    amax = np.abs(values).reshape(len(values), -1, 64).max(2)
    np.testing.assert_allclose(rows.scales, amax / 127, rtol=2**-11)
    assert np.abs(rows.codes.astype(int)).max() == 127


@pytest.mark.parametrize(("precision", "symmetric"), WAYS)
def test_a_row_does_not_depend_on_its_company(precision: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: one row at a time, all at once, in other blocks, from several threads."""
    values, asked = weights("heavy"), Precision(precision, 32, symmetric)
    together = quantize_rows(values, asked)
    with ThreadPoolExecutor(3) as pool:
        single = list(pool.map(lambda row: quantize_rows(values[row : row + 1], asked), range(len(values))))
    monkeypatch.setattr(rtn, "BLOCK_ELEMENTS", 1 << 10)
    for others in ([quantize_rows(values, asked)], single):
        np.testing.assert_array_equal(np.concatenate([r.codes for r in others]), together.codes)
        np.testing.assert_array_equal(np.concatenate([r.scales for r in others]), together.scales)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_input_is_taken_exactly(dtype: type, symmetric: bool) -> None:
    half = weights("gauss").astype(dtype)
    asked = Precision("int4", 32, symmetric)
    narrow, wide = quantize_rows(half, asked), quantize_rows(half.astype(np.float32), asked)
    np.testing.assert_array_equal(narrow.codes, wide.codes)
    np.testing.assert_array_equal(narrow.scales, wide.scales)


EDGES = {
    "zeros": np.zeros(32),
    "negative zeros": -np.zeros(32),
    "one weight": np.eye(1, 32)[0] * 0.3,
    "one negative weight": -np.eye(1, 32)[0] * 0.3,
    "constant": np.full(32, 0.7),
    "largest float": np.linspace(-1, 1, 32) * float(FLOAT32_MAX),
    "all largest": np.full(32, float(FLOAT32_MAX)),
    "subnormal": np.linspace(-1, 1, 32) * 1e-41,
    "least subnormal": np.eye(1, 32)[0] * 1e-45,
    "huge and tiny": np.where(np.arange(32) % 2, 1e38, 1e-38),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize(("kind", "symmetric"), WAYS)
def test_edges_of_float32(name: str, kind: str, symmetric: bool) -> None:
    """Finite scales and weights, no warning on the way, and the error of one code at most (or a flush to zero)."""
    values = EDGES[name].astype(np.float32).reshape(1, 32)
    precision = Precision(kind, 32, symmetric)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        rows = quantize_rows(values, precision)
        restored = rows.dequantize()
    assert np.isfinite(rows.scales).all() and np.isfinite(restored).all()
    largest = float(np.abs(values).max())
    one_code = 2 * largest / (2**precision.bits - 1)
    # Scales below the normal range lose digits, at most the weight itself: 1e-38 is nothing to a model.
    allowed = max(one_code * 1.0001, min(largest, 1.2e-38))
    assert np.abs(restored.astype(np.float64) - values).max() <= allowed
    if largest == 0:
        assert not restored.any()


def test_weights_that_are_codes_come_back() -> None:
    """Groups that hold exact multiples of a float16 scale are restored to rounding."""
    codes = np.tile(np.arange(-8, 8), (5, 4)).astype(np.float32)
    values = codes * np.array([[0.5], [0.3], [-0.01], [7.0], [1e-5]], np.float16).astype(np.float32)
    restored = quantize_rows(values, Precision("int4", 32)).dequantize()
    np.testing.assert_allclose(restored, values, rtol=3e-7)


@pytest.mark.parametrize(("precision", "symmetric"), WAYS)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.02, 1.0, 3e4, 1e8])
def test_scales_are_float16_values_and_codes_fit_them(precision: str, symmetric: bool, size: float) -> None:
    """Outside float16's range scales keep their digits; 8-bit codes are the nearest ones everywhere."""
    asked = Precision(precision, 32, symmetric)
    values = weights("gauss") / np.float32(0.02) * np.float32(size)
    rows = quantize_rows(values, asked)
    inside = (np.abs(rows.scales) >= half_scales.HALF_MIN) & (np.abs(rows.scales) <= half_scales.HALF_MAX)
    assert inside.any() == (size not in (1e-9, 1e8))
    kept = rows.scales[inside]
    np.testing.assert_array_equal(kept.astype(np.float16).astype(np.float32), kept)
    if precision != "int8":
        return
    low, high = (-127, 127) if symmetric else (0, 255)
    scales = np.repeat(rows.scales, 32, axis=1).astype(np.float64)
    zeros = 0 if rows.zero_points is None else np.repeat(rows.zero_points, 32, axis=1).astype(np.float64)
    exact = np.clip(values / scales + zeros, low, high)
    # Half a code, and what float32 rounds off a quotient of up to 255.
    assert np.abs(exact - rows.codes).max() <= 0.5 + 1e-4


def test_codes_scales_and_zero_points_have_the_promised_form() -> None:
    for kind, top in (("int4", 15), ("int8", 255)):
        rows = quantize_rows(weights("one_sided"), Precision(kind, 64, symmetric=False))
        assert rows.codes.shape == (64, 512) and rows.scales.shape == (64, 8)
        assert rows.zero_points is not None and rows.zero_points.shape == (64, 8)
        assert rows.codes.max() <= top and rows.zero_points.dtype == rows.codes.dtype == np.uint8
    rows = quantize_rows(weights("gauss"), Precision("int4", 64))
    assert rows.zero_points is None and rows.codes.min() == -8 and rows.codes.max() == 7
    empty = quantize_rows(np.empty((0, 64), np.float32), Precision("int4", 64))
    assert empty.codes.shape == (0, 64) and empty.scales.shape == (0, 1)
