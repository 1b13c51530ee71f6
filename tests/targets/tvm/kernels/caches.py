"""Caches of the kernels' format, built from and read as plain [B, Hkv, S, D] arrays."""

from dataclasses import dataclass

import numpy as np

from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_format import BLOCK, cache_kind, cache_shapes, rounded_capacity, value_width
from tests.targets.tvm.kernels.native import aligned


@dataclass
class Cache:
    """Arrays of one layer in the order of the kernels' parameters."""

    kind: str
    head_dim: int
    arrays: list[np.ndarray]

    @classmethod
    def empty(cls, isa: Isa, kind: str, rows: int, kv_heads: int, positions: int, head_dim: int) -> "Cache":
        """All zeros, as an engine starts."""
        shapes = cache_shapes(kind, rows, kv_heads, positions, head_dim, value_width(isa, head_dim))
        return cls(kind, head_dim, [aligned(np.zeros(shape, dtype)) for shape, dtype in shapes])

    @classmethod
    def of(cls, isa: Isa, kind: str, keys: np.ndarray, values: np.ndarray) -> "Cache":
        """Encoded from float32 [B, Hkv, S, D]; what is NaN becomes the worst that a cell of the kind can hold."""
        rows, heads, positions, head_dim = keys.shape
        capacity = rounded_capacity(positions)
        padding = ((0, 0), (0, 0), (0, capacity - positions), (0, 0))
        coded, scales = zip(*(encoded(kind, np.pad(x, padding)) for x in (keys, values)), strict=True)
        key = coded[0].reshape(rows, heads, capacity // BLOCK, BLOCK, head_dim).swapaxes(3, 4)
        value = np.pad(coded[1], (*((0, 0),) * 3, (0, value_width(isa, head_dim) - head_dim)))
        extra = scales if cache_kind(kind).scaled else ()
        return cls(kind, head_dim, [aligned(array) for array in (key, value, *extra)])

    def raw(self) -> tuple[np.ndarray, np.ndarray]:
        """Stored keys and values as [B, Hkv, S, D]."""
        key, value = self.arrays[:2]
        return key.swapaxes(3, 4).reshape(*value.shape[:3], self.head_dim), value[..., : self.head_dim]

    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as float64 [B, Hkv, S, D]."""
        keys, values = (array.astype(np.float64) for array in self.raw())
        if cache_kind(self.kind).scaled:
            return keys * self.arrays[2][..., None], values * self.arrays[3][..., None]
        return keys, values


def encoded(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(codes, scales) of values [..., D]."""
    if not cache_kind(kind).scaled:
        return x.astype(cache_kind(kind).dtype), None
    scales = np.abs(x).max(-1) / np.float32(127)
    codes = np.rint(x / np.where(scales > 0, scales, np.float32(1))[..., None])
    return np.where(np.isnan(codes), 127, codes).astype(np.int8), scales
