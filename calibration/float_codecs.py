"""Small floats to codes and back: E4M3, E5M2, E2M1, NF4, E8M0. exporter.core.number_formats says what codes mean.

Rounding is to nearest, halves to the even code (NF4: to the lower level, as bitsandbytes does), and saturating: what is
too large, infinite too, becomes the largest finite value, as ONNX's Cast with saturate=1 and the OCP specifications
allow. NaN stays NaN where there is one. The work is done in whole-array steps that release the interpreter's lock.
"""

import ml_dtypes
import numpy as np

from exporter.core.number_formats import E2M1_LEVELS, E2M1_MAX, E4M3_MAX, E5M2_MAX, E8M0_BIAS, E8M0_NAN, NF4_LEVELS

SIGN, MAGNITUDE, INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
# Between two magnitudes of E2M1, and whether the middle itself belongs to the upper one, whose code is then even.
E2M1_BOUNDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_LEVELS = np.array(NF4_LEVELS, np.float32)
NF4_BOUNDS = (_LEVELS[:-1].astype(np.float64) + _LEVELS[1:]) / 2


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 -> uint8 codes of FLOAT8E4M3FN."""
    return _encode_float8(values, fraction=3, least_exponent=-6, largest=E4M3_MAX, nan=0x7F)


def encode_e5m2(values: np.ndarray) -> np.ndarray:
    """float32 -> uint8 codes of FLOAT8E5M2; infinities become 57344 too."""
    return _encode_float8(values, fraction=2, least_exponent=-14, largest=E5M2_MAX, nan=0x7F)


def _encode_float8(values: np.ndarray, *, fraction: int, least_exponent: int, largest: float, nan: int) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    sign = ((bits & SIGN) >> np.uint32(24)).astype(np.uint8)
    bits = bits & MAGNITUDE
    # NaN is an integer above all others here and becomes `largest`: its code comes last.
    magnitude = np.minimum(bits, np.float32(largest).view(np.uint32)).view(np.float32)
    small = np.rint(magnitude * np.float32(2.0 ** (fraction - least_exponent)))
    # Half a unit in the last place kept, less one unless that place is odd: halves go to even.
    shift = np.uint32(23 - fraction)
    rounded = magnitude.view(np.uint32)
    rounded = rounded + (((rounded >> shift) & np.uint32(1)) + np.uint32((1 << (22 - fraction)) - 1))
    rounded = (rounded >> shift) - np.uint32((126 + least_exponent) << fraction)
    subnormal = magnitude < np.float32(2.0**least_exponent)
    codes = np.where(subnormal, small, rounded).astype(np.uint8)
    if (bits > INFINITY).any():
        codes[bits > INFINITY] = nan
    return codes | sign


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """uint8 codes -> float32."""
    values: np.ndarray = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def decode_e5m2(codes: np.ndarray) -> np.ndarray:
    """uint8 codes -> float32."""
    values: np.ndarray = codes.view(ml_dtypes.float8_e5m2).astype(np.float32)
    return values


def encode_e2m1(values: np.ndarray) -> np.ndarray:
    """float32 without NaN, which E2M1 has no code for -> uint8 codes 0..15, one a byte."""
    magnitude = np.abs(values)
    codes: np.ndarray = np.zeros(values.shape, np.uint8)
    for bound, upper in E2M1_BOUNDS:
        codes += (magnitude >= np.float32(bound)) if upper else (magnitude > np.float32(bound))
    codes |= np.signbit(values).view(np.uint8) << np.uint8(3)
    return codes


def round_e2m1(values: np.ndarray) -> np.ndarray:
    """float32 -> the float32 values of their E2M1 codes; no codes are made on the way.

    Adding 1.5 * 2^23 steps and taking them off again rounds to whole steps, halves to even. Steps are half of the
    power of two below a magnitude, from 1 up: 1/2 below 2, 1 below 4, then 2.
    """
    rounded: np.ndarray = np.clip(values, np.float32(-E2M1_MAX), np.float32(E2M1_MAX))
    offset = (rounded.view(np.uint32) & INFINITY).view(np.float32)
    np.maximum(offset, np.float32(1), out=offset)
    offset *= np.float32(1.5 * 2**22)
    rounded += offset
    rounded -= offset
    return rounded


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """uint8 codes 0..15 -> float32."""
    values: np.ndarray = np.array(E2M1_LEVELS, np.float32)[codes]
    return values


def encode_nf4(values: np.ndarray) -> np.ndarray:
    """float32 in units of the absolute maximum -> uint8 codes 0..15 of the nearest level, one a byte."""
    codes = np.zeros(values.shape, np.uint8)
    for bound in NF4_BOUNDS:
        # The float64 middle of two float32 levels, compared as float32: exact where the bound is rounded down.
        codes += values > _round_down(bound)
    return codes


def decode_nf4(codes: np.ndarray) -> np.ndarray:
    """uint8 codes 0..15 -> float32."""
    values: np.ndarray = _LEVELS[codes]
    return values


def encode_e8m0(values: np.ndarray) -> np.ndarray:
    """float32 -> uint8 codes of the largest power of two not above them, as the scales of OCP MX 1.0 (section 6.3):
    0 and what is below 2^-127 become 2^-127, infinities 2^127; NaN and negative values NaN."""
    values = np.ascontiguousarray(values, np.float32)
    _, exponents = np.frexp(values)
    codes = np.clip(exponents - 1 + E8M0_BIAS, 0, E8M0_NAN - 1)
    codes = np.where(values == 0, 0, np.where(np.isinf(values), E8M0_NAN - 1, codes))
    return np.where(np.isnan(values) | (values < 0), E8M0_NAN, codes).astype(np.uint8)


def decode_e8m0(codes: np.ndarray) -> np.ndarray:
    """uint8 codes -> float32: 2^(code - 127), NaN for 255."""
    powers = np.ldexp(np.float32(1), np.minimum(codes.astype(np.int32) - E8M0_BIAS, 127))
    return np.where(codes == E8M0_NAN, np.float32(np.nan), powers)


def _round_down(bound: float) -> np.float32:
    """The largest float32 not above a float64."""
    nearest = np.float32(bound)
    return np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > bound else nearest
