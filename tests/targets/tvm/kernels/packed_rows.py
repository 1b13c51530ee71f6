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
