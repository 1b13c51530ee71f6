"""Attention of many tokens: blocks of queries against blocks of keys, in tiles of registers.

A task is a block of queries of one segment and all query heads of one kv head; its rows are (token, head of the
group). Each block of keys and values is widened once per task into float32 scratch that fits the second-level cache,
so memory does not grow with the context. Blocks after a tile's last position are skipped.
"""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Operands
from targets.tvm.kernels.attention_tiles import Scores, State, Sums, gather, soften
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, broadcast, float_vector, load, store
from targets.tvm.kernels.partial import pieces

KEYS = 128
"""Positions of a block of keys."""


def prefill(operands: Operands, threads: Expr, queries: int) -> None:
    """y of every token of every segment; a task aims at `queries` rows.

    Tasks are dealt to the threads in turn, forwards and backwards, so that each gets as much of the causal triangle.
    """
    plan = operands.plan
    tokens = max(1, queries // plan.group)
    with T.parallel(0, threads) as worker:
        task = _Task(operands, tokens)
        dealt = T.alloc_buffer((1,), "int64")
        T.buffer_store(dealt, T.int64(0), [0])
        with T.serial(0, operands.segment_count) as segment:
            count = T.bind(T.cast(operands.segments[segment * 4 + 2], "int64"))
            with T.serial(0, (count + (tokens - 1)) // tokens) as block, T.serial(0, plan.kv_heads) as head:
                turn = T.bind(dealt[0] % (threads * 2))
                T.buffer_store(dealt, dealt[0] + 1, [0])
                with T.If(T.min(turn, threads * 2 - 1 - turn) == worker), T.Then():
                    task.run(segment, block * tokens, T.bind(T.min(count - block * tokens, T.int64(tokens))), head)


class _Task:
    """One thread's scratch, and the work on one task."""

    def __init__(self, operands: Operands, tokens: int) -> None:
        self.operands, self.plan, plan = operands, operands.plan, operands.plan
        rows = -(-tokens * plan.group // plan.tile_rows) * plan.tile_rows
        self.queries = T.alloc_buffer((rows * plan.head_dim,), "float32")
        self.keys = T.alloc_buffer((KEYS * plan.head_dim,), "float32")
        self.values = T.alloc_buffer((KEYS * plan.width,), "float32")
        scores = T.alloc_buffer((plan.tile_rows * KEYS,), "float32")
        factors = T.alloc_buffer((plan.tile_rows * plan.lanes,), "float32")
        self.scores = Scores(scores, factors, 0, KEYS)
        self.state = State(plan, rows)

    def run(self, segment: Expr, first: Expr, tokens: Expr, head: Expr) -> None:
        """Tokens first to first + tokens of a segment, the query heads of one kv head."""
        plan, operands = self.plan, self.operands
        row, begin, past = (T.bind(T.cast(operands.segments[segment * 4 + i], "int64")) for i in (0, 1, 3))
        lane = T.bind((row * plan.kv_heads + head) * (operands.blocks * BLOCK))
        rows = T.bind(tokens * plan.group)
        tiles = T.bind((rows + (plan.tile_rows - 1)) // plan.tile_rows)
        before = T.bind(past + first)
        self._pack(begin + first, tokens, head, tiles)
        self.state.clear(0, tiles * plan.tile_rows)
        with T.serial(0, (before + tokens + (KEYS - 1)) // KEYS) as block:
            start = T.bind(block * KEYS)
            count = T.bind(T.min(before + tokens - start, T.int64(KEYS)))
            self._widen_keys(lane + start, (count + (BLOCK - 1)) // BLOCK)
            self._widen_values(lane + start, count)
            with T.serial(0, tiles) as tile:
                # What the first row sees of this block, before its own position is counted.
                seen = T.bind(before - start + 1)
                last = T.min((tile * plan.tile_rows + (plan.tile_rows - 1)) // plan.group, tokens - 1)
                visible = T.bind(T.min(count, seen + last))
                with T.If(visible > 0), T.Then():
                    self._tile(T.bind(tile * plan.tile_rows), visible, count, seen)
        with T.serial(0, tokens) as token, T.serial(0, plan.group) as query:
            target = ((begin + first + token) * plan.heads + head * plan.group + query) * plan.head_dim
            self.state.write(operands.y, target, token * plan.group + query)

    def _pack(self, token: Expr, tokens: Expr, head: Expr, tiles: Expr) -> None:
        """Queries to scratch, rows one after the other; rows that fill up the last tile are zero."""
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
        with T.serial(0, tiles * (plan.tile_rows * plan.head_dim) - filled) as rest:
            T.buffer_store(self.queries, T.float32(0), [filled + rest])

    def _widen_keys(self, position: Expr, blocks: Expr) -> None:
        plan, vectors, scales = self.plan, self.operands.vectors, self.operands.scales
        with T.serial(0, blocks) as block:
            for column in range(0, BLOCK, plan.lanes):
                if scales:
                    scale = T.bind(load(scales[0], position + block * BLOCK + column, plan.lanes))
                with T.serial(0, plan.head_dim) as d:
                    start = (block * plan.head_dim + d) * BLOCK + column
                    value = read_cached(vectors, plan.kind, self.operands.key, position * plan.head_dim + start)
                    store(self.keys, start, value * scale if scales else value, plan.lanes)

    def _widen_values(self, position: Expr, count: Expr) -> None:
        plan, vectors, scales = self.plan, self.operands.vectors, self.operands.scales
        with T.serial(0, count) as s:
            if scales:
                scale = T.bind(broadcast(scales[1][position + s], plan.lanes))
            for column in range(0, plan.width, plan.lanes):
                start = (position + s) * plan.width + column
                value = read_cached(vectors, plan.kind, self.operands.value, start)
                store(self.values, s * plan.width + column, value * scale if scales else value, plan.lanes)

    def _tile(self, first: Expr, visible: Expr, count: Expr, seen: Expr) -> None:
        """Rows first, first + 1, ... against the `visible` first of the block's `count` positions."""
        plan = self.plan
        blocks = T.bind((visible + (BLOCK - 1)) // BLOCK)
        with T.serial(0, blocks) as block:
            self._score(first, block)
        with T.If(blocks * BLOCK > seen + first // plan.group), T.Then():
            self._mask(first, blocks * plan.block_vectors, count, seen)
        soften(self.state, first, plan.tile_rows, self.scores, blocks * plan.block_vectors, lambda w, number: w)
        gather(
            self.state,
            first,
            plan.tile_rows,
            self.scores,
            visible,
            lambda s, column: load(self.values, s * plan.width + column, plan.lanes),
        )

    def _score(self, first: Expr, block: Expr) -> None:
        """Scores of the tile's rows with one block of 32 positions."""
        plan, lanes, vectors = self.plan, self.plan.lanes, self.operands.vectors
        columns = plan.score_columns(plan.tile_rows)
        queries, keys = T.bind(first * plan.head_dim), T.bind(block * (plan.head_dim * BLOCK))
        with T.serial(0, plan.block_vectors // columns) as part:
            half = T.bind(part * columns)
            sums = Sums(lanes, plan.tile_rows, columns)
            sums.fill(lambda row, column: float_vector(0.0, lanes))
            with T.serial(0, plan.head_dim) as d:
                start = keys + d * BLOCK + half * lanes
                sums.add(
                    vectors,
                    lambda row: self.queries[queries + row * plan.head_dim + d],
                    lambda column: load(self.keys, start + column * lanes, lanes),
                )
            for row in range(plan.tile_rows):
                for column, group in enumerate(sums.groups):
                    place = self.scores.place(row, block * BLOCK + (half + column) * lanes)
                    store(self.scores.buffer, place, group[row], lanes)

    def _mask(self, first: Expr, vectors: Expr, count: Expr, seen: Expr) -> None:
        """Positions that a row does not see count for nothing."""
        plan, lanes = self.plan, self.plan.lanes
        with T.serial(0, plan.tile_rows) as row:
            end = T.min(seen + (first + row) // plan.group, count)
            limit = T.bind(T.broadcast(T.cast(end, "int32"), lanes))
            with T.serial(0, vectors) as number:
                place = self.scores.place(row, number * lanes)
                within = T.ramp(T.cast(number * lanes, "int32"), 1, lanes) < limit
                masked = T.Select(within, load(self.scores.buffer, place, lanes), float_vector(LOWEST, lanes))
                store(self.scores.buffer, place, masked, lanes)
