"""Softmax of prefill's tiles, online: what `soften` is for single tokens, for the rows of a tile at once."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Plan
from targets.tvm.kernels.attention_tiles import State, power
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, load, store


class Softmax:
    """Scores of a tile, `keys` positions a row, which become weights where they lie.

    `state` must have `lanes` rows more than are used.
    """

    def __init__(self, plan: Plan, state: State, keys: int) -> None:
        self.plan, self.state, self.keys = plan, state, keys
        rows = -(-plan.tile_rows // plan.lanes) * plan.lanes
        self.scores = T.alloc_buffer((plan.tile_rows * keys,), "float32")
        self.peaks, self.factors = (T.alloc_buffer((rows,), "float32") for _ in range(2))

    def place(self, row: Expr, position: Expr) -> Expr:
        """Where a score lies."""
        return row * self.keys + position

    def factor(self, row: Expr) -> Expr:
        """What the older values of a row are to be multiplied by, a vector of equal lanes."""
        return broadcast(self.factors[row], self.plan.lanes)

    def weigh(self, first: Expr, count: Expr) -> None:
        """Scores become weights, `count` vectors of each row; the rows are first, first + 1, ... of the state."""
        plan, lanes, state, vectors = (self.plan, self.plan.lanes, self.state, self.state.vectors)
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
            self._weigh_row(first + row, row, count, work)

    def _weigh_row(self, state_row: Expr, row: Expr, count: Expr, work: Registers) -> None:
        lanes, vectors, totals = self.plan.lanes, self.state.vectors, self.state.total
        work[0] = float_vector(0.0, lanes)
        top = T.bind(broadcast(self.state.top[state_row], lanes))
        with T.serial(0, count) as number:
            place = self.place(row, number * lanes)
            weight = T.bind(power(vectors, T.bind(load(self.scores, place, lanes) - top)))
            work[0] = work[0] + weight
            store(self.scores, place, weight, lanes)
        total = load(totals, state_row * lanes, lanes) * self.factor(row) + work[0]
        store(totals, state_row * lanes, total, lanes)
