"""Softmax of prefill's tiles, online: what `soften` is for single tokens, for the rows of a tile at once."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Plan
from targets.tvm.kernels.attention_tiles import State, power
from targets.tvm.kernels.bf16 import exp2_coarse, join
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, load, store


class Softmax:
    """Scores of a tile, `keys` positions a row, and the weights that become of them.

    `weights` are `scores` themselves or, where the plan says so, pairs of bfloat16 in int32 words. `state` must have
    `lanes` rows more than are used.
    """

    def __init__(self, plan: Plan, state: State, keys: int) -> None:
        self.plan, self.state, self.keys = plan, state, keys
        rows = -(-plan.tile_rows // plan.lanes) * plan.lanes
        self.scores = T.alloc_buffer((plan.tile_rows * keys,), "float32")
        self.weights = T.alloc_buffer((plan.tile_rows * keys // 2,), "int32") if plan.bf16_values else self.scores
        self.peaks, self.factors = (T.alloc_buffer((rows,), "float32") for _ in range(2))

    def place(self, row: Expr, position: Expr) -> Expr:
        """Where a score lies."""
        return row * self.keys + position

    def factor(self, row: Expr) -> Expr:
        """What the older values of a row are to be multiplied by, a vector of equal lanes."""
        return broadcast(self.factors[row], self.plan.lanes)

    def weigh(self, first: Expr, count: Expr) -> None:
        """Scores become weights, `count` vectors of each row; the rows are first, first + 1, ... of the state."""
        plan, lanes, state, vectors = self.plan, self.plan.lanes, self.state, self.state.vectors
        work = Registers("float32", lanes, 1)
        for row in range(plan.tile_rows // lanes * lanes, -(-plan.tile_rows // lanes) * lanes, lanes):
            store(self.peaks, row, float_vector(LOWEST, lanes), lanes)
        with T.serial(0, plan.tile_rows) as row:
            work[0] = float_vector(LOWEST, lanes)
            with T.serial(0, count) as number:
                work[0] = T.max(work[0], load(self.scores, self.place(row, number * lanes), lanes))
            T.buffer_store(self.peaks, work.reduce(0, T.max), [row])
        for row in range(0, plan.tile_rows, lanes):
            before = T.bind(load(state.top, first + row, lanes))
            top = T.bind(T.max(before, load(self.peaks, row, lanes)))
            store(state.top, first + row, top, lanes)
            store(self.factors, row, power(vectors, before - top), lanes)
        with T.serial(0, plan.tile_rows) as row:
            work[0] = load(state.total, (first + row) * lanes, lanes) * self.factor(row)
            top = T.bind(broadcast(state.top[first + row], lanes))
            if plan.bf16_values:
                with T.serial(0, count // 2) as number:
                    low, high = (self._coarse(row, number * 2 + i, top, work) for i in range(2))
                    store(self.weights, row * (self.keys // 2) + number * lanes, join(low, high), lanes)
            else:
                with T.serial(0, count) as number:
                    place = self.place(row, number * lanes)
                    weight = T.bind(power(vectors, load(self.scores, place, lanes) - top))
                    work[0] = work[0] + weight
                    store(self.scores, place, weight, lanes)
            store(state.total, (first + row) * lanes, work[0], lanes)

    def _coarse(self, row: Expr, number: Expr, top: Expr, total: Registers) -> Expr:
        lanes = self.plan.lanes
        score = T.bind(load(self.scores, self.place(row, number * lanes), lanes) - top)
        weight = T.bind(exp2_coarse(self.state.vectors, score))
        total[0] = total[0] + weight
        return weight
