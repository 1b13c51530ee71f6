"""Scores of prefill: the queries of a task and a block of keys in scratch, as float32, and their products."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import Operands
from targets.tvm.kernels.attention_softmax import Softmax
from targets.tvm.kernels.attention_tiles import Sums
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, float_vector, load, store
from targets.tvm.kernels.partial import pieces


class BlockScores:
    """One thread's scratch: `rows` queries, `keys` keys."""

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
