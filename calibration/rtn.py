"""Round-to-nearest quantization of weight rows, with scales that minimise the squared error.

For one group of weights w, each step size of a short search gives codes q. The scale that fits them best is
s = sum(q w) / sum(q q); it takes sum(q w)^2 / sum(q q) off the squared error sum(w w). The step that takes off most
wins; its fitted scale gives new codes, which are never worse (Lloyd 1982), and those one last fit. Symmetric scales
carry the sign that maps the largest weight to code -8 (-32 of 6 bits), so that all codes are in use.

Scales are rounded to float16 values, as some targets store them: every target computes with the same numbers. 8-bit
codes are chosen for the rounded scale; to 16 or 64 codes a change of 2^-12 is nothing. (Choosing those once more, from
the last fit, would lower the squared error by a little, and raised KL on the example model from 0.0282 to 0.0292.)

The work goes in blocks that fit a core's cache. A group's result depends on its own weights alone: neither chunks
nor threads change a bit of it.
"""

from collections.abc import Callable

import numpy as np

from calibration.coded_floats import magnitude as magnitude
from calibration.coded_floats import quantize_coded_floats
from calibration.coded_floats import wants_tensor_amax as wants_tensor_amax
from calibration.half_scales import as_half
from exporter.core.recipe import CHANNEL, Precision
from exporter.core.weights import QuantizedRows

# Large enough that two threads seldom wait for the interpreter lock, small enough for the shared cache.
BLOCK_ELEMENTS = 1 << 19
# The code that the largest weight of a group is mapped to before clipping to -8..7. 7 and 8 are plain rounding without
# and with the sign trick, so the search is never worse than that. Steps above 8 clip the largest weight. In large
# groups that pays. In groups below LARGE_GROUP it takes 2 % more off the squared error and loses elsewhere: on held-out
# text of the example model KL rose from 0.029 to 0.031 and the perplexity ratio from 1.022 to 1.029
# (docs/benchmarks.md).
SYMMETRIC_STEPS = (7.0, 7.5, 8.0)
SYMMETRIC_STEPS_OF_LARGE_GROUPS = (7.0, 8.0, 8.6, 9.6)
LARGE_GROUP = 64
# In a row of thousands the largest lies farther out: 7 % off the squared error of 2048 Gaussian weights, 17 % of 8192,
# a third to a half where tails are heavy.
SYMMETRIC_STEPS_OF_ROWS = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 14.0, 18.0, 24.0)
# The same for -32..31: they take 11 % off the squared error in groups of 32, 4 % in groups of 128.
SYMMETRIC_STEPS_OF_6_BITS = (31.0, 31.5, 32.0)
# How many codes the range of a group spans, 15 being plain. Within 1.2 % of a search over 48 steps x 16 zero points.
ASYMMETRIC_STEPS = (15.0, 14.4, 15.7, 16.4)
FLOAT32_MAX = np.finfo(np.float32).max

# (groups [n, g] as stored, float32 workspace [3, n, g]) -> codes as float32 [n, g] (a part of the workspace),
# scales float32 [n, 1], zero points float32 [n, 1] or None
_Quantizer = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def quantize_rows(values: np.ndarray, precision: Precision, tensor_amax: float | None = None) -> QuantizedRows:
    """Quantize finite rows [n, K] (float32, bfloat16 or float16) to any coded precision; whole groups fill a row.

    int4 and int6 scales minimise the squared error. int8 ones are plain: a search would take 2 % off an error that is
    300 times smaller than that of int4 already. `tensor_amax`, max|w| of the whole matrix, is what fp8 with one scale
    and nvfp4 start from (`wants_tensor_amax`); without it `values` are the whole matrix.
    """
    if not precision.is_integer:
        return quantize_coded_floats(values, precision, tensor_amax)
    if precision.bits == 8:
        return absmax_rows(values, precision)
    return _by_blocks(values, precision, _symmetric_search(precision) if precision.symmetric else _search_asymmetric)


def absmax_rows(values: np.ndarray, precision: Precision, tensor_amax: float | None = None) -> QuantizedRows:
    """Plain rounding, as a baseline and for int8: scale = amax / 7, 31 or 127; with zero points range / 15 or 255.
    Floats: the scales that calibration.coded_floats starts from."""
    if not precision.is_integer:
        return quantize_coded_floats(values, precision, tensor_amax, search=False)
    top = 2.0 ** (precision.bits - 1) - 1 if precision.symmetric else 2.0**precision.bits - 1

    def plain(groups: np.ndarray, work: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return _plain_symmetric(groups, work, top) if precision.symmetric else _plain_asymmetric(groups, work, top)

    return _by_blocks(values, precision, plain)


def _by_blocks(values: np.ndarray, precision: Precision, quantize: _Quantizer) -> QuantizedRows:
    rows, width = values.shape
    size = precision.group_of(width)
    assert width % size == 0, f"groups of {size} in rows of {width}"
    groups = np.ascontiguousarray(values).reshape(-1, size)
    codes = np.empty(groups.shape, np.int8 if precision.symmetric else np.uint8)
    scales = np.empty((len(groups), 1), np.float32)
    zero_points = None if precision.symmetric else np.empty((len(groups), 1), np.uint8)
    step = max(1, BLOCK_ELEMENTS // size)
    work = np.empty((3, min(step, len(groups)), size), np.float32)
    for start in range(0, len(groups), step):
        part = slice(start, min(start + step, len(groups)))
        block = groups[part]
        found, scales[part], zeros = quantize(block, work[:, : len(block)])
        np.copyto(codes[part], found, casting="unsafe")
        if zero_points is not None and zeros is not None:
            np.copyto(zero_points[part], zeros, casting="unsafe")
    shape = (rows, width // size)
    return QuantizedRows(
        codes.reshape(rows, width),
        scales.reshape(shape),
        None if zero_points is None else zero_points.reshape(shape),
        precision,
    )


def _symmetric_search(precision: Precision) -> _Quantizer:
    half = 2.0 ** (precision.bits - 1)
    steps: tuple[float, ...] = SYMMETRIC_STEPS_OF_6_BITS
    if precision.bits == 4:
        large = (precision.group_size or 0) >= LARGE_GROUP
        steps = SYMMETRIC_STEPS_OF_LARGE_GROUPS if large else SYMMETRIC_STEPS
        steps = SYMMETRIC_STEPS_OF_ROWS if precision.group_size == CHANNEL else steps
    return lambda groups, work: _search_symmetric(groups, work, half, steps)


def _search_symmetric(
    groups: np.ndarray, work: np.ndarray, half: float, steps: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, None]:
    """Codes from -half to half - 1."""
    weights, codes, _ = work
    np.copyto(weights, groups)
    unit = -_signed_absmax(groups)
    np.divide(weights, _nonzero(unit), out=weights)  # the largest weight becomes -1: nothing overflows below
    best_gain, best_scale = np.full_like(unit, -1), np.zeros_like(unit)
    for step in steps:
        np.multiply(weights, np.float32(step), out=codes)
        scale, gain = _fit(weights, _clip_symmetric(codes, half))
        better = gain > best_gain
        best_gain, best_scale = np.where(better, gain, best_gain), np.where(better, scale, best_scale)
    np.multiply(weights, 1 / _nonzero(best_scale), out=codes)
    scale, _ = _fit(weights, _clip_symmetric(codes, half))
    return codes, _stored(scale, unit, half), None


def _clip_symmetric(codes: np.ndarray, half: float) -> np.ndarray:
    np.rint(codes, out=codes)
    return np.clip(codes, np.float32(-half), np.float32(half - 1), out=codes)


def _search_asymmetric(groups: np.ndarray, work: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights, codes, offsets = work
    np.copyto(weights, groups)
    low, unit = _range(weights)
    np.divide(weights, _nonzero(unit), out=weights)
    low = low / _nonzero(unit)
    best_gain, best_scale, best_zero = np.full_like(unit, -1), np.zeros_like(unit), np.zeros_like(unit)
    for step in ASYMMETRIC_STEPS:
        # Both ends of the range lose equally where the step clips: (step - 15) / 2 codes each.
        zero = np.clip(np.rint(-low * np.float32(step / 2) - np.float32((step - 15) / 2)), 0, 15)
        np.multiply(weights, np.float32(step / 2), out=codes)
        _clip_asymmetric(codes, zero)
        scale, gain = _fit(weights, np.subtract(codes, zero, out=offsets))
        better = gain > best_gain
        best_gain, best_scale = np.where(better, gain, best_gain), np.where(better, scale, best_scale)
        best_zero = np.where(better, zero, best_zero)
    np.multiply(weights, 1 / _nonzero(best_scale), out=codes)
    _clip_asymmetric(codes, best_zero)
    scale, _ = _fit(weights, np.subtract(codes, best_zero, out=offsets))
    return codes, _stored(scale, unit, np.maximum(best_zero, 15 - best_zero)), best_zero


def _clip_asymmetric(codes: np.ndarray, zero: np.ndarray, top: float = 15) -> None:
    np.add(codes, zero, out=codes)
    np.rint(codes, out=codes)
    np.clip(codes, np.float32(0), np.float32(top), out=codes)


def _fit(weights: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least-squares scale of codes [n, g], and what it takes off the squared error: both [n, 1]."""
    product = np.vecdot(codes, weights)[:, None]
    norm = np.maximum(np.vecdot(codes, codes)[:, None], np.float32(1))
    scale = product / norm
    return scale, product * scale


def _plain_symmetric(groups: np.ndarray, work: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray, None]:
    weights, codes, _ = work
    np.copyto(weights, groups)
    unit = np.abs(_signed_absmax(groups))
    stored = _stored(np.float32(1 / top), unit, top)
    np.divide(weights, _nonzero(unit), out=codes)
    np.multiply(codes, unit / _nonzero(stored), out=codes)
    np.rint(codes, out=codes)
    return np.clip(codes, np.float32(-top), np.float32(top), out=codes), stored, None


def _plain_asymmetric(groups: np.ndarray, work: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weights, codes, _ = work
    np.copyto(weights, groups)
    low, unit = _range(weights)
    zero = np.rint(-low / _nonzero(unit) * np.float32(top / 2))
    stored = _stored(np.float32(2 / top), unit, np.maximum(zero, top - zero))
    np.divide(weights, _nonzero(unit), out=codes)
    np.multiply(codes, unit / _nonzero(stored), out=codes)
    _clip_asymmetric(codes, zero, top)
    return codes, stored, zero


def _signed_absmax(groups: np.ndarray) -> np.ndarray:
    """The weight of largest magnitude of each group [n, g], as float32 [n, 1].

    Compared as integers with the sign rotated into the lowest bit: the order of magnitudes, at the width as stored.
    """
    bits = 8 * groups.dtype.itemsize
    stored = groups.view(f"u{groups.dtype.itemsize}")
    key = _reduce_groups(np.maximum, (stored << 1) | (stored >> (bits - 1)))
    return ((key >> 1) | (key << (bits - 1))).view(groups.dtype).astype(np.float32)


def _range(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest weight and half the range of each group, both widened to contain 0: float32 [n, 1] each."""
    low = np.minimum(_reduce_groups(np.minimum, weights), np.float32(0))
    high = np.maximum(_reduce_groups(np.maximum, weights), np.float32(0))
    return low, high / 2 - low / 2  # halved first: the range itself may exceed float32


def _reduce_groups(operation: np.ufunc, groups: np.ndarray) -> np.ndarray:
    """[n, g] -> [n, 1] by halving; NumPy's own reduce along a short last axis takes twice as long."""
    while groups.shape[1] % 2 == 0:
        groups = operation(groups[:, ::2], groups[:, 1::2])
    result: np.ndarray = operation.reduce(groups, axis=1, keepdims=True)
    return result


def _nonzero(divisor: np.ndarray | np.float32) -> np.ndarray:
    return np.where(divisor == 0, np.float32(1), divisor)


def _stored(scale: np.ndarray | np.float32, unit: np.ndarray, top: np.ndarray | float) -> np.ndarray:
    """scale * unit as a float16 value where it is in the range of those; 1 for a group of zeros.

    Kept so small that no code (at most `top` from zero) overflows.
    """
    limit = np.nextafter(FLOAT32_MAX / np.float32(top), np.float32(0))
    exact = np.where(unit == 0, np.float32(1), np.clip(scale * unit, -limit, limit))
    return as_half(exact)
