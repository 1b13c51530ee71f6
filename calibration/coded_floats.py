"""Rounding to nearest of weight rows in fp8, nf4, nvfp4 and mxfp4.

fp8: scale = amax / 448 of the row or the matrix (float32), as modelopt and compressed-tensors have it.
nf4: scale = amax of the group, every weight to the nearest level (QLoRA, appendix E).
nvfp4: matrix scale = amax / (6 * 448) in float32; a group's scale is E4M3(amax of the group / 6 / matrix scale).
mxfp4: scale = 2^(floor(log2 amax) - 2), as OCP MX 1.0 section 6.3 has it.

Where `search` is on, nf4 and nvfp4 try a few scales for each group and keep the one of least squared error: for codes
of values q, a scale s takes s (2 sum(q w) - s sum(q q)) off sum(w w). The plain scale is always among them.
"""

from collections.abc import Callable

import numpy as np

from calibration.float_codecs import decode_e4m3, decode_nf4, encode_e2m1, encode_e4m3, encode_nf4, round_e2m1
from calibration.half_scales import as_half
from exporter.core.number_formats import E2M1_MAX, E4M3_MAX
from exporter.core.recipe import TENSOR, Precision
from exporter.core.weights import QuantizedRows

BLOCK_ELEMENTS = 1 << 16
LEAST_SCALE = np.float32(2.0**-126)
LEAST_E4M3 = np.float32(2.0**-9)
# What the plain scale is multiplied by. docs/recipes.md has what each list wins.
NF4_STEPS = (1.0, 1.05, 0.93)
NVFP4_STEPS = (1.0, 1.5, 1.2, 0.9)


def wants_tensor_amax(precision: Precision) -> bool:
    """Whether rows of this precision are scaled by the maximum of their whole matrix."""
    return precision.kind == "nvfp4" or (precision.kind == "fp8" and precision.group_size == TENSOR)


def magnitude(rows: np.ndarray) -> float:
    """max|w| of finite rows (float32, bfloat16, float16); 0 of none."""
    if not rows.size:
        return 0.0
    size = rows.dtype.itemsize
    bits = np.ascontiguousarray(rows).view(f"u{size}")
    largest = (bits & bits.dtype.type((1 << (8 * size - 1)) - 1)).max(keepdims=True)
    return float(largest.view(rows.dtype).astype(np.float32).reshape(-1)[0])


def quantize_coded_floats(
    values: np.ndarray, precision: Precision, tensor_amax: float | None = None, *, search: bool = True
) -> QuantizedRows:
    """Rows [n, K] (float32, bfloat16 or float16, finite); without `tensor_amax` they are the whole matrix."""
    rows, width = values.shape
    size = precision.group_of(width)
    assert width % size == 0, f"groups of {size} in rows of {width}"
    amax = magnitude(values) if tensor_amax is None and wants_tensor_amax(precision) else tensor_amax or 0.0
    groups = np.ascontiguousarray(values).reshape(-1, size)
    codes, scales = np.empty(groups.shape, np.uint8), np.empty((len(groups), 1), np.float32)
    step = max(1, BLOCK_ELEMENTS // size)
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        block = groups[part].astype(np.float32)
        codes[part], scales[part] = _quantize_block(block, precision, np.float32(amax), search)
    return QuantizedRows(codes.reshape(rows, width), scales.reshape(rows, width // size), None, precision)


def _quantize_block(
    groups: np.ndarray, precision: Precision, tensor_amax: np.float32, search: bool
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, g] -> codes uint8 [n, g], scales float32 [n, 1]."""
    amax = np.abs(groups).max(axis=1, keepdims=True)
    if precision.kind == "fp8":
        scale = _fp8_scale(tensor_amax if precision.group_size == TENSOR else amax, len(groups))
        return encode_e4m3(groups / scale), scale
    if precision.kind == "nf4":
        scale = _nf4_scale(groups, amax, search)
        return encode_nf4(groups / scale), scale
    nvfp4 = precision.kind == "nvfp4"
    scale = _nvfp4_scale(groups, amax, tensor_amax, search) if nvfp4 else _mxfp4_scale(amax)
    return encode_e2m1(groups / scale), scale


def _fp8_scale(amax: np.ndarray | np.float32, count: int) -> np.ndarray:
    return _positive(np.broadcast_to(np.asarray(amax, np.float32), (count, 1)) / np.float32(E4M3_MAX))


def _nf4_scale(groups: np.ndarray, amax: np.ndarray, search: bool) -> np.ndarray:
    if not search:
        return _positive(amax)
    scales = [_positive(amax * np.float32(step)) for step in NF4_STEPS]
    return _positive(_best(groups, amax, scales, lambda values: decode_nf4(encode_nf4(values)), fit=True))


def nvfp4_matrix_scale(tensor_amax: float) -> np.float32:
    """The float32 scale of a whole matrix in nvfp4, by which its E4M3 scales are multiplied; 1 for zeros."""
    return np.float32(_positive(np.float32(tensor_amax) / np.float32(E2M1_MAX * E4M3_MAX)))


def _nvfp4_scale(groups: np.ndarray, amax: np.ndarray, tensor_amax: np.float32, search: bool) -> np.ndarray:
    matrix = nvfp4_matrix_scale(float(tensor_amax))
    plain = amax / np.float32(E2M1_MAX) / matrix
    scales = [_e4m3_scale(plain * np.float32(step)) * matrix for step in (NVFP4_STEPS if search else NVFP4_STEPS[:1])]
    return _best(groups, amax, scales, round_e2m1)


def _e4m3_scale(scale: np.ndarray) -> np.ndarray:
    """Rounded to E4M3, never to zero: groups of zeros get 1, as in modelopt."""
    rounded = np.maximum(decode_e4m3(encode_e4m3(scale)), LEAST_E4M3)
    return np.where(scale == 0, np.float32(1), rounded)


def _mxfp4_scale(amax: np.ndarray) -> np.ndarray:
    """Twice that where the squared error says so would take 6 % off it and add 2 % to the example model's KL."""
    _, exponent = np.frexp(amax)  # amax = f 2^exponent, f from 1/2: floor(log2 amax) = exponent - 1
    return np.ldexp(np.float32(1), np.maximum(np.where(amax == 0, 0, exponent - 3), -126))


def _best(
    groups: np.ndarray,
    amax: np.ndarray,
    scales: list[np.ndarray],
    rounded: Callable[[np.ndarray], np.ndarray],
    *,
    fit: bool = False,
) -> np.ndarray:
    """Of some scales [n, 1] for groups [n, g] the one of least squared error; the first of equals.

    With `fit`, each stands for the least-squares scale of its codes, whose own codes are never worse.
    """
    if len(scales) == 1:
        return scales[0]
    unit = _positive(amax)
    weights = groups / unit  # in units of the group's maximum, so that no square overflows
    best, best_gain = scales[0], np.full_like(amax, -np.inf)
    for scale in scales:
        relative = scale / unit
        codes = rounded(weights / relative)
        product, norm = np.vecdot(codes, weights)[:, None], np.vecdot(codes, codes)[:, None]
        if fit:
            relative = product / np.maximum(norm, np.float32(0.5))
            scale = as_half(relative * unit)
        gain = relative * (2 * product - relative * norm)
        best = np.where(gain > best_gain, scale, best)
        best_gain = np.maximum(gain, best_gain)
    return best


def _positive(scale: np.ndarray | np.float32) -> np.ndarray:
    """1 in the place of 0, and large enough to divide by."""
    return np.where(scale == 0, np.float32(1), np.maximum(scale, LEAST_SCALE))
