"""Codecs of small floats against torch, ml_dtypes and published tables: every code, ties, edges, NaN."""

from collections.abc import Callable
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch

from calibration import float_codecs
from calibration.float_codecs import (
    decode_e2m1,
    decode_e4m3,
    decode_e5m2,
    decode_e8m0,
    decode_nf4,
    encode_e2m1,
    encode_e4m3,
    encode_e5m2,
    encode_e8m0,
    encode_nf4,
    round_e2m1,
)
from exporter.core.number_formats import NF4_LEVELS, decode_table

Codec = Callable[[np.ndarray], np.ndarray]
CODES = np.arange(256, dtype=np.uint8)
FLOAT8 = [
    pytest.param(encode_e4m3, decode_e4m3, torch.float8_e4m3fn, 448.0, id="e4m3"),
    pytest.param(encode_e5m2, decode_e5m2, torch.float8_e5m2, 57344.0, id="e5m2"),
]


def spread_floats() -> np.ndarray:
    """A million float32 of every exponent and both signs, NaN and infinities among them, and random fractions."""
    rng = np.random.default_rng(3)
    patterns = np.arange(0, 1 << 32, 4099, dtype=np.uint64) + rng.integers(0, 4099, (1 << 32) // 4099 + 1).astype(
        np.uint64
    )
    return patterns.clip(0, (1 << 32) - 1).astype(np.uint32).view(np.float32)


def torch_codes(values: np.ndarray, dtype: torch.dtype, largest: float) -> np.ndarray:
    """torch does not saturate float8: values are clipped first."""
    return torch.from_numpy(np.clip(values, -largest, largest)).to(dtype).view(torch.uint8).numpy()


@pytest.mark.parametrize(("encode", "decode", "dtype", "largest"), FLOAT8)
def test_float8_codes_mean_what_torch_says(encode: Codec, decode: Codec, dtype: torch.dtype, largest: float) -> None:
    expected = torch.from_numpy(CODES).view(dtype).float().numpy()
    np.testing.assert_array_equal(decode(CODES), expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(encode(expected[finite]), CODES[finite])
    assert np.isnan(decode(encode(expected[np.isnan(expected)]))).all()


@pytest.mark.parametrize(("encode", "decode", "dtype", "largest"), FLOAT8)
def test_float8_rounds_as_torch(encode: Codec, decode: Codec, dtype: torch.dtype, largest: float) -> None:
    """All exponents, and exactly between every two neighbours, and one float32 beside."""
    table = np.unique(decode(CODES)[np.isfinite(decode(CODES))])
    middles = (table[1:] + table[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    for values in (spread_floats(), middles, *near, table):
        values = values[~np.isnan(values)]
        np.testing.assert_array_equal(encode(values), torch_codes(values, dtype, largest))


@pytest.mark.parametrize(("encode", "decode", "dtype", "largest"), FLOAT8)
def test_float8_saturates_and_keeps_nan_and_signs(
    encode: Codec, decode: Codec, dtype: torch.dtype, largest: float
) -> None:
    edges = np.array([largest, largest * 1.1, 1e9, 3e38, np.inf, -np.inf, -largest, 0.0, -0.0], np.float32)
    found = decode(encode(edges))
    np.testing.assert_array_equal(found, np.clip(edges, -largest, largest))
    assert np.signbit(found[-1]) and not np.signbit(found[-2])
    quiet, signalling = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)[[0, 2]]
    with np.errstate(all="raise"):
        assert np.isnan(decode(encode(np.array([quiet, signalling], np.float32)))).all()


def test_table_of_fp8_is_the_format() -> None:
    np.testing.assert_array_equal(
        decode_table("fp8"), torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy()
    )
    assert np.flatnonzero(np.isnan(decode_table("fp8"))).tolist() == [0x7F, 0xFF]


def test_e2m1_codes_mean_what_ml_dtypes_says() -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for kind in ("nvfp4", "mxfp4"):
        np.testing.assert_array_equal(decode_table(kind), expected)
    np.testing.assert_array_equal(decode_e2m1(codes), expected)
    np.testing.assert_array_equal(np.signbit(decode_e2m1(codes)), np.signbit(expected))
    np.testing.assert_array_equal(encode_e2m1(expected), codes)


def test_e2m1_rounds_as_ml_dtypes() -> None:
    levels = np.unique(decode_table("nvfp4"))
    middles = (levels[1:] + levels[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    spread = spread_floats()
    for values in (spread[~np.isnan(spread)], middles, *near):
        expected = values.astype(ml_dtypes.float4_e2m1fn)
        np.testing.assert_array_equal(encode_e2m1(values), expected.view(np.uint8))
        np.testing.assert_array_equal(round_e2m1(values), expected.astype(np.float32))


def test_nf4_has_the_levels_of_the_paper() -> None:
    """QLoRA, appendix E, and its construction: quantiles of the normal distribution, eight to a side with zero."""
    np.testing.assert_array_equal(decode_nf4(np.arange(16, dtype=np.uint8)), np.array(NF4_LEVELS, np.float32))
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    built = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(NF4_LEVELS, built / built.max(), atol=2e-7)


def test_nf4_takes_the_nearest_level() -> None:
    """Against every distance in float64; in the middle the lower level, as bitsandbytes' comparisons have it."""
    levels = np.array(NF4_LEVELS, np.float32)
    np.testing.assert_array_equal(encode_nf4(levels), np.arange(16))
    middles = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(5)
    for values in (
        rng.uniform(-1.2, 1.2, 100_000).astype(np.float32),
        middles,
        *near,
        np.array([9e9, -9e9], np.float32),
    ):
        distances = np.abs(values.astype(np.float64)[:, None] - levels.astype(np.float64))
        np.testing.assert_array_equal(encode_nf4(values), distances.argmin(axis=1))


def test_e8m0_codes_mean_what_ml_dtypes_says() -> None:
    expected = CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_e8m0(CODES), expected)
    np.testing.assert_array_equal(encode_e8m0(expected), CODES)


def test_e8m0_rounds_down_to_a_power_of_two() -> None:
    values = spread_floats()
    values = values[np.isfinite(values) & (values > 0)]
    powers = np.floor(np.log2(values.astype(np.float64))).clip(-127, 127)
    np.testing.assert_array_equal(encode_e8m0(values), powers + 127)


def test_e8m0_edges() -> None:
    edges = np.array([0.0, -0.0, 2.0**-149, 3e38, np.inf, np.nan, -1.0, -np.inf], np.float32)
    assert encode_e8m0(edges).tolist() == [0, 0, 0, 254, 254, 255, 255, 255]


def test_shapes_and_strides_are_kept() -> None:
    values = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)[::2, ::3]
    for encode in (encode_e4m3, encode_e5m2, encode_e2m1, encode_nf4, encode_e8m0):
        codes = encode(values)
        assert codes.shape == values.shape and codes.dtype == np.uint8
        np.testing.assert_array_equal(codes, encode(values.copy()))
    assert float_codecs.encode_e4m3(np.empty((0, 4), np.float32)).shape == (0, 4)
