"""The packing of quantized activations by blocks of rows, taken apart with NumPy alone."""

import numpy as np


def unpack_rows(packed: np.ndarray, tile: int) -> np.ndarray:
    """[M, W] as kernels write it (blocks [W][rows of the block]) -> plain rows [M, W]."""
    rows, width = packed.shape
    flat, blocks = packed.reshape(-1), []
    for first in range(0, rows, tile):
        count = min(tile, rows - first)
        blocks.append(flat[first * width : (first + count) * width].reshape(width, count).T)
    return np.concatenate(blocks)


def quantized(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 x [M, K] -> codes int8 [M, K], scales float32 [M, G], sums int32 [M, G], by the formulas."""
    groups = x.reshape(len(x), -1, group)
    scales = np.abs(groups).max(axis=2) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1) / scales, np.float32(0))
    codes = np.rint(groups * inverse[..., None]).astype(np.int32)
    return codes.astype(np.int8).reshape(x.shape), scales, codes.sum(axis=2, dtype=np.int32)


def quantized_with_exponents(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """float32 x [M, K] -> codes int8 [M, K], shifts int32 [M, G], sums int32 [M, G], bases float32 [M]."""
    one, groups = np.float32(1), x.reshape(len(x), -1, group)
    largest = np.abs(groups).max(axis=2)
    top = largest.max(axis=1, keepdims=True)
    base = top / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(top < 2.0**-80, np.float32(0), one / base)
        ratio = largest * np.where(top < 2.0**-80, np.float32(0), one / top)
    fraction, exponent = np.frexp(ratio)  # ratio = fraction * 2^exponent, 1/2 <= fraction < 1
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    exponent = np.clip(np.where(ratio == 0, -24, exponent), -24, 0).astype(np.int32)
    codes = np.rint(groups * np.ldexp(inverse, -exponent)[..., None]).astype(np.int32)
    shifts, bases = (exponent + 32) << 23, np.ldexp(np.where(top < 2.0**-80, np.float32(0), base), -32)[:, 0]
    return codes.astype(np.int8).reshape(x.shape), shifts, codes.sum(axis=2, dtype=np.int32), bases


def quantized_by_token(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same with one scale for a row: all exponents are 0."""
    top = np.abs(x).max(axis=1)
    zero, base = top < 2.0**-80, top / np.float32(127)
    inverse = np.float32(1) / np.where(zero, np.float32(np.inf), base)
    codes = np.rint(x * inverse[:, None]).astype(np.int32)
    sums = codes.reshape(len(x), -1, group).sum(axis=2, dtype=np.int32)
    bases = np.ldexp(np.where(zero, np.float32(0), base), -32)
    return codes.astype(np.int8), np.full_like(sums, 32 << 23), sums, bases
