"""Softmax of prefill's tiles, online: what `soften` is for single tokens, for the rows of a tile at once."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Plan
from targets.tvm.kernels.attention_tiles import State, power
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, load, store
from targets.tvm.kernels.short import neighbours
from targets.tvm.kernels.vector import exp2_coarse

PEAK_BITS = 14
"""The largest integer weight of a row and block is 2^14."""


class Softmax:
    """Scores of a tile, `keys` positions a row, and the weights that become of them.

    `weights` are `scores` themselves or, if `short`, pairs of 16-bit integers in int32 words, PEAK_BITS bits for the
    largest of a row. `state` must have `lanes` rows more than are used. `scores` may be those of another one.
    """

    def __init__(self, plan: Plan, state: State, keys: int, short: bool, scores: Expr = None) -> None:
        self.plan, self.state, self.keys, self.short = plan, state, keys, short
        rows = -(-plan.tile_rows // plan.lanes) * plan.lanes
        self.scores = T.alloc_buffer((plan.tile_rows * keys,), "float32") if scores is None else scores
        self.weights = T.alloc_buffer((plan.tile_rows * keys // 2,), "int32") if short else self.scores
        self.peaks, self.factors, self.shares = (T.alloc_buffer((rows,), "float32") for _ in range(3))

    def place(self, row: Expr, position: Expr) -> Expr:
        """Where a score lies."""
        return row * self.keys + position

    def factor(self, row: Expr) -> Expr:
        """What the older values of a row are to be multiplied by, a vector of equal lanes."""
        return broadcast(self.factors[row], self.plan.lanes)

    def share(self, row: Expr) -> Expr:
        """What integer weights of a row are to be multiplied by."""
        return broadcast(self.shares[row], self.plan.lanes)

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
            if self.short:
                above = top + float_vector(PEAK_BITS, lanes)
                store(self.shares, row, power(vectors, load(self.peaks, row, lanes) - above), lanes)
        with T.serial(0, plan.tile_rows) as row:
            self._weigh_row(first + row, row, count, work)

    def _weigh_row(self, state_row: Expr, row: Expr, count: Expr, work: Registers) -> None:
        lanes, vectors, totals = self.plan.lanes, self.state.vectors, self.state.total
        work[0] = float_vector(0.0, lanes)
        top = self.peaks[row] - T.float32(PEAK_BITS) if self.short else self.state.top[state_row]
        top = T.bind(broadcast(top, lanes))
        with T.serial(0, count) as number:
            place = self.place(row, number * lanes)
            weight = self._power(T.bind(load(self.scores, place, lanes) - top))
            work[0] = work[0] + weight
            if self.short:
                words = neighbours(vectors, weight, float_vector(1.0, lanes))
                store(self.weights, row * (self.keys // 2) + number * (lanes // 2), words, lanes // 2)
            else:
                store(self.scores, place, weight, lanes)
        new = work[0] * self.share(row) if self.short else work[0]
        total = load(totals, state_row * lanes, lanes) * self.factor(row) + new
        store(totals, state_row * lanes, total, lanes)

    def _power(self, x: Expr) -> Expr:
        vectors = self.state.vectors
        return T.bind(exp2_coarse(vectors, x) if self.short and self.plan.lanes == 16 else power(vectors, x))
