"""How keys and values lie in memory; the same for the kernels that write them, those that read them, and the runner.

key    [B, Hkv, S/32, D, 32]   after rotary, transposed inside blocks of 32 positions
value  [B, Hkv, S, Dp]         Dp is D rounded up to whole vectors, zeros behind D
int8 caches also hold key_scale, value_scale float32 [B, Hkv, S]: max|x| / 127 of the head's values at a position;
codes are rint(x / scale).
"""

from dataclasses import dataclass

from exporter.core.errors import UnsupportedError
from targets.tvm.isa import Isa

BLOCK = 32
"""Positions of one block of transposed keys."""


@dataclass(frozen=True)
class CacheKind:
    """What one cached value is stored as; `scaled` kinds have one float32 scale per position and head."""

    name: str
    dtype: str
    scaled: bool


KINDS = {
    kind.name: kind
    for kind in (
        CacheKind("fp32", "float32", False),
        CacheKind("fp16", "float16", False),
        CacheKind("int8", "int8", True),
    )
}


def cache_kind(name: str) -> CacheKind:
    """The kind of a name; UnsupportedError lists those that exist."""
    if name not in KINDS:
        raise UnsupportedError("tvm.cache", f"cache kind {name!r} is unknown", f"available: {', '.join(KINDS)}")
    return KINDS[name]


def rounded_capacity(positions: int, block: int = BLOCK) -> int:
    """S for a context of so many positions."""
    return -(-positions // block) * block


def value_width(isa: Isa, head_dim: int) -> int:
    """Dp, the stored length of a value."""
    return -(-head_dim // isa.lanes) * isa.lanes


def cache_shapes(
    kind: str, rows: int, kv_heads: int, positions: int, head_dim: int, width: int, block: int = BLOCK
) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape, dtype) of key, value and, where the kind has them, key_scale and value_scale of one layer; `width` is
    `value_width`."""
    described, capacity = cache_kind(kind), rounded_capacity(positions, block)
    key = (rows, kv_heads, capacity // block, head_dim, block)
    value = (rows, kv_heads, capacity, width)
    scales = (((rows, kv_heads, capacity), "float32"),) * 2 if described.scaled else ()
    return ((key, described.dtype), (value, described.dtype), *scales)
