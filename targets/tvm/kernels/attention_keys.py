"""Scores of prefill: the queries of a task and a block of keys in scratch, and their products.

Either as float32, or as 16-bit integers where VNNI multiplies twice as many of those. Each query and each key is
scaled to a Euclidean norm of 32767 then, so no sum of products exceeds 2^30 (Cauchy and Schwarz).
"""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import Operands
from targets.tvm.kernels.attention_softmax import Softmax
from targets.tvm.kernels.attention_tiles import Sums
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, int_vector, intrinsic, load, store
from targets.tvm.kernels.partial import load_part, pieces
from targets.tvm.kernels.short import TINY, add_pairs, neighbours, rounded
from targets.tvm.kernels.short import pair as pair_of

LARGEST = 32767.0
"""The norm of integer rows."""


class FloatScores:
    """Products of float32."""

    def __init__(self, operands: Operands, rows: int, keys: int) -> None:
        self.operands, self.plan = operands, operands.plan
        self.queries = T.alloc_buffer((rows * self.plan.head_dim,), "float32")
        self.keys = T.alloc_buffer((keys * self.plan.head_dim,), "float32")

    def pack_queries(self, token: Expr, tokens: Expr, head: Expr, rows: Expr) -> None:
        """Rows (token, query head) one after the other; those up to `rows` that fill up the last tile are zero."""
        plan, lanes = self.plan, self.plan.lanes
        length = plan.group * plan.head_dim
        with T.serial(0, tokens) as number:
            source = ((token + number) * plan.kv_heads + head) * length
            with T.serial(0, length // lanes) as vector:
                value = load(self.operands.q, source + vector * lanes, lanes)
                store(self.queries, number * length + vector * lanes, value, lanes)
            for offset, part in pieces(length % lanes):
                place = length - length % lanes + offset
                store(self.queries, number * length + place, load(self.operands.q, source + place, part), part)
        filled = tokens * length
        with T.serial(0, rows * plan.head_dim - filled) as rest:
            T.buffer_store(self.queries, T.float32(0), [filled + rest])

    def pack_keys(self, position: Expr, blocks: Expr) -> None:
        """Blocks of keys from a position of the cache on, widened."""
        plan, vectors, scales = self.plan, self.operands.vectors, self.operands.scales
        with T.serial(0, blocks) as block:
            for column in range(0, BLOCK, plan.lanes):
                if scales:
                    scale = T.bind(load(scales[0], position + block * BLOCK + column, plan.lanes))
                with T.serial(0, plan.head_dim) as d:
                    start = (block * plan.head_dim + d) * BLOCK + column
                    value = read_cached(vectors, plan.kind, self.operands.key, position * plan.head_dim + start)
                    store(self.keys, start, value * scale if scales else value, plan.lanes)

    def score(self, first: Expr, block: Expr, into: Softmax) -> None:
        """Scores of the tile's rows, from `first` on, with one block of positions."""
        plan, lanes, vectors = self.plan, self.plan.lanes, self.operands.vectors
        columns = plan.score_columns(plan.tile_rows)
        queries, keys = (T.bind(first * plan.head_dim), T.bind(block * (plan.head_dim * BLOCK)))
        with T.serial(0, plan.block_vectors // columns) as part:
            half = T.bind(part * columns * lanes)
            sums = Sums(lanes, plan.tile_rows, columns)
            sums.fill(lambda row, column: float_vector(0.0, lanes))
            with T.serial(0, plan.head_dim) as d:
                start = keys + d * BLOCK + half
                sums.add(
                    vectors.add_product,
                    lambda row: self.queries[queries + row * plan.head_dim + d],
                    lambda column: load(self.keys, start + column * lanes, lanes),
                )
            for row in range(plan.tile_rows):
                for column, group in enumerate(sums.groups):
                    store(into.scores, into.place(row, block * BLOCK + half + column * lanes), group[row], lanes)


class ShortScores:
    """Products of 16-bit integers: words of two neighbours of a head, queries [row][words], keys [block][D/2][32].

    Codes of int8 caches are integers already; their scales are what makes scores of the sums.
    """

    def __init__(self, operands: Operands, rows: int, keys: int) -> None:
        self.operands, self.plan, plan = operands, operands.plan, operands.plan
        self.words = -(-plan.head_dim // plan.lanes) * plan.lanes // 2
        self.queries = T.alloc_buffer((rows * self.words,), "int32")
        self.query_scales = T.alloc_buffer((rows,), "float32")
        self.keys = T.alloc_buffer((keys * (plan.head_dim // 2),), "int32")
        self.key_scales = T.alloc_buffer((keys,), "float32")

    def pack_queries(self, token: Expr, tokens: Expr, head: Expr, rows: Expr) -> None:
        """Rows (token, query head) one after the other; those up to `rows` that fill up the last tile are zero."""
        plan = self.plan
        work = Registers("float32", plan.lanes, 2)
        with T.serial(0, tokens) as number, T.serial(0, plan.group) as query:
            source = T.bind((((token + number) * plan.kv_heads + head) * plan.group + query) * plan.head_dim)
            self._pack_query(source, T.bind(number * plan.group + query), work)
        filled = T.bind(tokens * plan.group)
        with T.serial(0, rows - filled) as rest:
            T.buffer_store(self.query_scales, T.float32(0), [filled + rest])
            with T.serial(0, self.words) as word:
                T.buffer_store(self.queries, T.int32(0), [(filled + rest) * self.words + word])

    def _pack_query(self, source: Expr, row: Expr, work: Registers) -> None:
        plan, lanes, vectors = self.plan, self.plan.lanes, self.operands.vectors
        columns = range(0, plan.head_dim, lanes)

        def part(column: int) -> Expr:
            return T.bind(load_part(self.operands.q, source + column, min(lanes, plan.head_dim - column), work, 1))

        work[0] = float_vector(0.0, lanes)
        for column in columns:
            values = part(column)
            work[0] = vectors.fma(values, values, work[0])
        norm = T.bind(T.max(T.sqrt(work.reduce(0, lambda a, b: a + b)), T.float32(TINY)))
        T.buffer_store(self.query_scales, norm * T.float32(1 / LARGEST), [row])
        factor = T.bind(broadcast(T.float32(LARGEST) / norm, lanes))
        for column in columns:
            store(self.queries, row * self.words + column // 2, neighbours(vectors, part(column), factor), lanes // 2)

    def pack_keys(self, position: Expr, blocks: Expr) -> None:
        """Blocks of keys from a position of the cache on."""
        plan, lanes = self.plan, self.plan.lanes
        with T.serial(0, blocks) as block:
            for column in range(0, BLOCK, lanes):
                source = T.bind((position + block * BLOCK) * plan.head_dim + column)
                scale = block * BLOCK + column
                if plan.kind.scaled:
                    store(self.key_scales, scale, load(self.operands.scales[0], position + scale, lanes), lanes)
                    self._pack_columns(source, block, column, self._code)
                else:
                    norm = self._norms(source)
                    store(self.key_scales, scale, norm * float_vector(1 / LARGEST, lanes), lanes)
                    self._pack_columns(source, block, column, self._scaled(T.bind(float_vector(LARGEST, lanes) / norm)))

    def _value(self, at: Expr) -> Expr:
        return read_cached(self.operands.vectors, self.plan.kind, self.operands.key, at)

    def _scaled(self, factor: Expr) -> Callable[[Expr], Expr]:
        return lambda at: rounded(self.operands.vectors, self._value(at), factor)

    def _code(self, at: Expr) -> Expr:
        return T.cast(load(self.operands.key, at, self.plan.lanes), self.operands.vectors.int)

    def _norms(self, source: Expr) -> Expr:
        """Norms of the keys of a vector of positions."""
        vectors, lanes = self.operands.vectors, self.plan.lanes
        squares = Registers("float32", lanes, 2)
        for half in range(2):
            squares[half] = float_vector(0.0, lanes)
        with T.serial(0, self.plan.head_dim // 2) as pair:
            for half in range(2):
                value = T.bind(self._value(source + (pair * 2 + half) * BLOCK))
                squares[half] = vectors.fma(value, value, squares[half])
        root = intrinsic(vectors.float, "llvm.sqrt", squares[0] + squares[1])
        return T.bind(T.max(root, float_vector(TINY, lanes)))

    def _pack_columns(self, source: Expr, block: Expr, column: int, code: Callable[[Expr], Expr]) -> None:
        lanes, pairs = self.plan.lanes, self.plan.head_dim // 2
        with T.serial(0, pairs) as pair:
            low, high = (code(source + (pair * 2 + half) * BLOCK) for half in range(2))
            store(self.keys, (block * pairs + pair) * BLOCK + column, pair_of(self.operands.vectors, low, high), lanes)

    def score(self, first: Expr, block: Expr, into: Softmax) -> None:
        """Scores of the tile's rows, from `first` on, with one block of positions."""
        plan, lanes = self.plan, self.plan.lanes
        columns, pairs = plan.score_columns(plan.tile_rows), plan.head_dim // 2
        queries, keys = T.bind(first * self.words), T.bind(block * (pairs * BLOCK))
        with T.serial(0, plan.block_vectors // columns) as part:
            half = T.bind(part * columns * lanes)
            sums = Sums(lanes, plan.tile_rows, columns, "int32")
            sums.fill(lambda row, column: int_vector(0, lanes))
            with T.serial(0, pairs) as pair:
                start = keys + pair * BLOCK + half
                sums.add(
                    lambda total, keys, query: add_pairs(self.operands.vectors, total, keys, query),
                    lambda row: self.queries[queries + row * self.words + pair],
                    lambda column: load(self.keys, start + column * lanes, lanes),
                )
            places = [T.bind(block * BLOCK + half + column * lanes) for column in range(columns)]
            scales = [T.bind(load(self.key_scales, place, lanes)) for place in places]
            for row in range(plan.tile_rows):
                scale = T.bind(broadcast(self.query_scales[first + row], lanes))
                for place, own, group in zip(places, scales, sums.groups, strict=True):
                    score = T.cast(group[row], f"float32x{lanes}") * own * scale
                    store(into.scores, into.place(row, place), score, lanes)
