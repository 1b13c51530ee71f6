"""Attention of many tokens: blocks of queries against blocks of keys, in tiles of registers.

A task is a block of queries of one segment and all query heads of one kv head; its rows are (token, head of the
group). Each block of keys and values is brought once per task into the form that is multiplied, in scratch that fits
the second-level cache, so memory does not grow with the context. Blocks after a tile's last position are skipped.
"""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_keys import BlockScores
from targets.tvm.kernels.attention_plan import LOWEST, Operands
from targets.tvm.kernels.attention_softmax import Softmax
from targets.tvm.kernels.attention_tiles import State
from targets.tvm.kernels.attention_values import BlockValues
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.ir import Expr, float_vector, load, store

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
        self.scores = BlockScores(operands, rows, KEYS)
        self.state = State(plan, rows + plan.lanes)
        self.softmax = Softmax(plan, self.state, KEYS)
        self.values = BlockValues(operands, KEYS)

    def run(self, segment: Expr, first: Expr, tokens: Expr, head: Expr) -> None:
        """Tokens first to first + tokens of a segment, the query heads of one kv head."""
        plan, operands = self.plan, self.operands
        row, begin, past = (T.bind(T.cast(operands.segments[segment * 4 + i], "int64")) for i in (0, 1, 3))
        lane = T.bind((row * plan.kv_heads + head) * (operands.blocks * BLOCK))
        tiles = T.bind((tokens * plan.group + (plan.tile_rows - 1)) // plan.tile_rows)
        before = T.bind(past + first)
        self.scores.pack_queries(begin + first, tokens, head, tiles * plan.tile_rows)
        self.state.clear(0, tiles * plan.tile_rows)
        with T.serial(0, (before + tokens + (KEYS - 1)) // KEYS) as block:
            start = T.bind(block * KEYS)
            count = T.bind(T.min(before + tokens - start, T.int64(KEYS)))
            self.scores.pack_keys(T.bind(lane + start), (count + (BLOCK - 1)) // BLOCK)
            self.values.pack(lane + start, count)
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

    def _tile(self, first: Expr, visible: Expr, count: Expr, seen: Expr) -> None:
        """Rows first, first + 1, ... against the `visible` first of the block's `count` positions."""
        plan = self.plan
        blocks = T.bind((visible + (BLOCK - 1)) // BLOCK)
        with T.serial(0, blocks) as block:
            self.scores.score(first, block, self.softmax)
        with T.If(blocks * BLOCK > seen + first // plan.group), T.Then():
            self._mask(first, blocks * plan.block_vectors, count, seen)
        self.softmax.weigh(first, blocks * plan.block_vectors)
        self.values.gather(first, visible, self.softmax)

    def _mask(self, first: Expr, vectors: Expr, count: Expr, seen: Expr) -> None:
        """Positions that a row does not see count for nothing."""
        plan, lanes = self.plan, self.plan.lanes
        with T.serial(0, plan.tile_rows) as row:
            end = T.min(seen + (first + row) // plan.group, count)
            limit = T.bind(T.broadcast(T.cast(end, "int32"), lanes))
            with T.serial(0, vectors) as number:
                place = self.softmax.place(row, number * lanes)
                within = T.ramp(T.cast(number * lanes, "int32"), 1, lanes) < limit
                masked = T.Select(within, load(self.softmax.scores, place, lanes), float_vector(LOWEST, lanes))
                store(self.softmax.scores, place, masked, lanes)
