"""Sizes of attention's tiles, and the arguments its parts share."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_format import BLOCK, CacheKind, cache_kind, value_width
from targets.tvm.kernels.ir import Expr
from targets.tvm.kernels.vector import Vectors

LOWEST = -1e30
"""Stands for minus infinity: differences of it stay numbers."""


@dataclass(frozen=True)
class Plan:
    """Static sizes. A kv head serves `group` query heads; `width` is the stored length of a value."""

    isa: Isa
    heads: int
    kv_heads: int
    head_dim: int
    kind: CacheKind

    @classmethod
    def of(cls, isa: Isa, heads: int, kv_heads: int, head_dim: int, kind: str) -> "Plan":
        """ValueError when the kv heads do not divide the heads."""
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key and value heads evenly")
        return cls(isa, heads, kv_heads, head_dim, cache_kind(kind))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def lanes(self) -> int:
        return self.isa.lanes

    @property
    def width(self) -> int:
        return value_width(self.isa, self.head_dim)

    @property
    def block_vectors(self) -> int:
        """Vectors of a block of positions."""
        return BLOCK // self.lanes

    @property
    def accumulators(self) -> int:
        """Registers that may hold sums; the rest holds one row of operands and a broadcast."""
        return 24 if self.isa.registers >= 32 else 12

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of prefill: two vectors wide, it fills the accumulators."""
        return self.accumulators // 2

    @property
    def decode_batches(self) -> list[tuple[int, int]]:
        """(first, count) of the query heads that decode takes at a time."""
        return parts(self.group, 8 if self.isa.registers >= 32 else 6)

    def score_columns(self, rows: int) -> int:
        """Vectors of positions whose scores `rows` rows accumulate at a time; divides `block_vectors`."""
        columns = self.block_vectors
        while rows * columns > self.accumulators:
            columns //= 2
        return columns

    def value_columns(self, rows: int) -> list[tuple[int, int, int]]:
        """(first vector, vectors, repetitions) of the tiles that cover a value's width, `rows` rows; nearly equal."""
        count = self.width // self.lanes
        most = 4 if self.isa.registers >= 32 else max(2, min(3, self.accumulators // rows))
        columns = -(-count // -(-count // most))
        rest = count % columns
        return [(0, columns, count // columns)] + [(count - rest, rest, 1)] * bool(rest)


@dataclass(frozen=True)
class Operands:
    """Buffers of the kernel, flat; `segment_count` and `blocks` (of the cache, per row) are expressions."""

    plan: Plan
    q: Expr
    segments: Expr
    key: Expr
    value: Expr
    scales: tuple[Expr, ...]
    y: Expr
    segment_count: Expr
    blocks: Expr

    @cached_property
    def vectors(self) -> Vectors:
        return Vectors(self.plan.isa)


def parts(count: int, most: int) -> list[tuple[int, int]]:
    """(first, count) of the fewest, most equal parts that are no larger than `most`: 5 by 4 gives 2 and 3."""
    number = -(-count // most)
    bounds = [count * i // number for i in range(number + 1)]
    return [(low, high - low) for low, high in pairwise(bounds)]
