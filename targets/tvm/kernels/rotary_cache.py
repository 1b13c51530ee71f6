"""Rotary embedding of queries and keys, and the write of keys and values into the cache, in one pass over qkv."""

from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_format import BLOCK, CacheKind, cache_kind, value_width
from targets.tvm.kernels.cache_values import to_code, to_half
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, float_vector, kernel, load, size, store
from targets.tvm.kernels.partial import pieces
from targets.tvm.kernels.vector import LOG2_E, Vectors

SERIAL_TOKENS = 4
"""Up to so many tokens are less work than waking the threads."""


def rotary_cache(
    isa: Isa, name: str, heads: int, kv_heads: int, head_dim: int, kind: str, scale: float
) -> tirx.PrimFunc:
    """qkv float32 [T, (heads + 2 * kv_heads) * D], cos, sin float32 [P, D/2], positions, token_rows int32 [T],
    key, value, (key_scale, value_scale) -> q float32 [T, heads * D].

    Halves of a head are rotated against each other (RotaryEmbedding, interleaved=0). q is multiplied by
    scale * log2(e), so that attention computes powers of two. Each token's key and value are written at its position
    of its cache row. ValueError for an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding turns pairs: head_dim {head_dim} is odd")
    stored, blocks = cache_kind(kind), size("blocks")
    tokens, table, rows, width = size("tokens"), size("table"), size("rows"), value_width(isa, head_dim)
    scales = ("key_scale", "value_scale") if stored.scaled else ()
    with kernel(name) as finished:
        qkv, cos, sin, positions, token_rows, *cache, q = arguments(
            qkv=((tokens, (heads + 2 * kv_heads) * head_dim), "float32"),
            cos=((table, head_dim // 2), "float32"),
            sin=((table, head_dim // 2), "float32"),
            positions=((tokens,), "int32"),
            token_rows=((tokens,), "int32"),
            key=((rows, kv_heads, blocks, head_dim, BLOCK), stored.dtype),
            value=((rows, kv_heads, blocks * BLOCK, width), stored.dtype),
            **dict.fromkeys(scales, ((rows, kv_heads, blocks * BLOCK), "float32")),
            q=((tokens, heads * head_dim), "float32"),
        )
        work = _Token(isa, stored, heads, kv_heads, head_dim, scale * LOG2_E, blocks, qkv, cos, sin, q, cache)
        with T.If(tokens <= SERIAL_TOKENS):
            with T.Then(), T.serial(0, tokens) as token:
                work.write(token, positions, token_rows)
            with T.Else(), T.parallel(0, tokens) as token:
                work.write(token, positions, token_rows)
    return finished()


@dataclass
class _Token:
    """The work on one token."""

    isa: Isa
    kind: CacheKind
    heads: int
    kv_heads: int
    head_dim: int
    query_factor: float
    blocks: Expr
    qkv: Expr
    cos: Expr
    sin: Expr
    q: Expr
    cache: list[Expr]
    vectors: Vectors = field(init=False)
    width: int = field(init=False)
    line: Any = field(init=False)
    codes: Any = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = Vectors(self.isa)
        self.width = value_width(self.isa, self.head_dim)

    def write(self, token: Expr, positions: Expr, token_rows: Expr) -> None:
        """q of the token, and its keys and values into the cache."""
        self.line = T.alloc_buffer((self.width,), "float32")
        self.codes = T.alloc_buffer((self.width,), self.kind.dtype)
        position = T.bind(T.cast(positions[token], "int64"))
        row = T.bind(T.cast(token_rows[token], "int64"))
        angle = position * (self.head_dim // 2)
        first = token * ((self.heads + 2 * self.kv_heads) * self.head_dim)
        with T.serial(0, self.heads) as head:
            target = (token * self.heads + head) * self.head_dim
            self._rotate(first + head * self.head_dim, angle, self.q, target, self.query_factor)
        with T.serial(0, self.kv_heads) as head:
            self._clear_padding()
            lane = (row * self.kv_heads + head) * self.blocks * BLOCK
            self._rotate(first + (self.heads + head) * self.head_dim, angle, self.line, 0, 1.0)
            self._encode(2, lane + position)
            block = (lane + position // BLOCK * BLOCK) * self.head_dim + position % BLOCK
            with T.serial(0, self.head_dim) as d:
                T.buffer_store(self.cache[0], self.codes[d], [block + d * BLOCK])
            value = first + (self.heads + self.kv_heads + head) * self.head_dim
            for offset, lanes in self._parts(self.head_dim):
                store(self.line, offset, load(self.qkv, value + offset, lanes), lanes)
            self._encode(3, lane + position)
            for offset in range(0, self.width, self.isa.lanes):
                codes = load(self.codes, offset, self.isa.lanes)
                store(self.cache[1], (lane + position) * self.width + offset, codes, self.isa.lanes)

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """Whole vectors, then the powers of two of the rest."""
        whole = count // self.isa.lanes * self.isa.lanes
        full = [(offset, self.isa.lanes) for offset in range(0, whole, self.isa.lanes)]
        return full + [(whole + offset, length) for offset, length in pieces(count - whole)]

    def _clear_padding(self) -> None:
        if self.width > self.head_dim:
            store(self.line, self.width - self.isa.lanes, float_vector(0.0, self.isa.lanes), self.isa.lanes)

    def _rotate(self, first: Expr, angle: Expr, target: Expr, start: Expr, factor: float) -> None:
        """The head at qkv[first:], turned by the angles at `angle`, times `factor`, to target[start:]."""
        half = self.head_dim // 2
        for offset, lanes in self._parts(half):
            low, high = (T.bind(load(self.qkv, first + side + offset, lanes)) for side in (0, half))
            cos, sin = (T.bind(load(table, angle + offset, lanes)) for table in (self.cos, self.sin))
            turned = (low * cos - high * sin, high * cos + low * sin)
            for side, value in zip((0, half), turned, strict=True):
                scaled = value if factor == 1.0 else value * _constant(factor, lanes)
                store(target, start + side + offset, scaled, lanes)

    def _encode(self, scale_index: int, position: Expr) -> None:
        """`line` to `codes`; the scale of int8 goes to its place in the cache."""
        lanes = self.isa.lanes
        if self.kind.scaled:
            top = Registers("float32", lanes, 1)
            top[0] = float_vector(0.0, lanes)
            for offset in range(0, self.width, lanes):
                top[0] = T.max(top[0], self.vectors.abs(load(self.line, offset, lanes)))
            scale = T.bind(top.reduce(0, T.max) / T.float32(127))
            T.buffer_store(self.cache[scale_index], scale, [position])
            divisor = T.bind(broadcast(T.Select(scale > T.float32(0), scale, T.float32(1)), lanes))
        for offset in range(0, self.width, lanes):
            x = T.bind(load(self.line, offset, lanes))
            if self.kind.scaled:
                codes = to_code(self.vectors, x, divisor)
            else:
                codes = to_half(self.vectors, x) if self.kind.name == "fp16" else x
            store(self.codes, offset, codes, lanes)


def _constant(value: float, lanes: int) -> Expr:
    return float_vector(value, lanes) if lanes > 1 else T.float32(value)
