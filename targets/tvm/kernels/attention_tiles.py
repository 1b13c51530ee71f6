"""Steps of attention on tiles in registers: sums of scores, softmax in base 2, and sums of values.

A running maximum and sum per row make the softmax exact over any number of blocks: when the maximum rises, what was
summed before is scaled down (Milakov and Gimelshein, 2018, Online normalizer calculation for softmax).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import LOWEST, Plan, parts
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, load, store
from targets.tvm.kernels.partial import store_part
from targets.tvm.kernels.vector import Vectors

LEAST_EXPONENT = -126.0
"""2^-126 is the smallest normal float32; weights below it are as good as zero."""


Multiply = Callable[[Expr, Expr, Expr], Expr]
"""(sum, operand, factor) -> sum + operand * factor, lane for lane."""


class Sums:
    """`rows` x `columns` vectors that accumulate, one group of registers a column."""

    def __init__(self, lanes: int, rows: int, columns: int) -> None:
        self.lanes, self.rows, self.columns = lanes, rows, columns
        self.groups = [Registers("float32", lanes, rows) for _ in range(columns)]

    def fill(self, first: Callable[[int, int], Expr]) -> None:
        """Every vector starts as first(row, column)."""
        for row in range(self.rows):
            for column, group in enumerate(self.groups):
                group[row] = first(row, column)

    def add(self, multiply: Multiply, weight: Callable[[int], Expr], operand: Callable[[int], Expr]) -> None:
        """self[row, column] += weight(row) * operand(column); weights are scalars."""
        values = [T.bind(operand(column)) for column in range(self.columns)]
        for row in range(self.rows):
            factor = T.bind(broadcast(weight(row), self.lanes))
            for value, group in zip(values, self.groups, strict=True):
                group[row] = multiply(group[row], value, factor)


@dataclass(frozen=True)
class Scores:
    """Rows of scores, later of weights, in memory, `stride` floats apart from `first` on.

    factors[row * lanes:] is what the older values of a row are to be multiplied by.
    """

    buffer: Any
    factors: Any
    first: int
    stride: int

    def place(self, row: Expr, position: Expr) -> Expr:
        return self.first + row * self.stride + position


class State:
    """Maximum, sum (one partial sum a lane) and weighted values of `rows` rows, in memory."""

    def __init__(self, plan: Plan, rows: int) -> None:
        self.plan, self.vectors = plan, Vectors(plan.isa)
        self.top = T.alloc_buffer((rows,), "float32")
        self.total = T.alloc_buffer((rows * plan.lanes,), "float32")
        self.values = T.alloc_buffer((rows * plan.width,), "float32")

    def clear(self, first: Expr, rows: Expr) -> None:
        lanes, width = self.plan.lanes, self.plan.width
        with T.serial(0, rows) as row:
            T.buffer_store(self.top, T.float32(LOWEST), [first + row])
            store(self.total, (first + row) * lanes, float_vector(0.0, lanes), lanes)
            for column in range(0, width, lanes):
                store(self.values, (first + row) * width + column, float_vector(0.0, lanes), lanes)

    def write(self, y: Expr, start: Expr, row: Expr) -> None:
        """The finished row to y[start:start + D]."""
        lanes, head_dim = self.plan.lanes, self.plan.head_dim
        work = Registers("float32", lanes, 2)
        work[0] = load(self.total, row * lanes, lanes)
        factor = T.bind(broadcast(T.float32(1) / work.reduce(0, lambda a, b: a + b), lanes))
        for column in range(0, head_dim, lanes):
            value = load(self.values, row * self.plan.width + column, lanes) * factor
            store_part(y, start + column, value, min(lanes, head_dim - column), work, 1)

    def merge(self, row: Expr, other: "State", other_row: Expr) -> None:
        """Row `row` takes in what another state gathered over other positions."""
        lanes, width = self.plan.lanes, self.plan.width
        top = T.bind(T.max(self.top[row], other.top[other_row]))
        mine, its = (
            T.bind(power(self.vectors, broadcast(state.top[index] - top, lanes)))
            for state, index in ((self, row), (other, other_row))
        )
        T.buffer_store(self.top, top, [row])
        for name, length in (("total", lanes), ("values", width)):
            own, foreign = getattr(self, name), getattr(other, name)
            for column in range(0, length, lanes):
                value = load(foreign, other_row * length + column, lanes) * its
                store(own, row * length + column, load(own, row * length + column, lanes) * mine + value, lanes)


def power(vectors: Vectors, x: Expr) -> Expr:
    """2^x for x of at most 0."""
    return vectors.exp2(T.bind(T.max(x, float_vector(LEAST_EXPONENT, vectors.lanes))))


def soften(
    state: State, first: Expr, rows: Expr, scores: Scores, count: Expr, weigh: Callable[[Expr, Expr], Expr]
) -> None:
    """Scores become weights, in place, of `rows` rows of `count` vectors: first, first + 1, ... of the state.

    weigh(weights, vector number) gives what is stored, after the sum is taken.
    """
    vectors, lanes = state.vectors, state.plan.lanes
    work = Registers("float32", lanes, 1)
    with T.serial(0, rows) as row:
        work[0] = float_vector(LOWEST, lanes)
        with T.serial(0, count) as number:
            work[0] = T.max(work[0], load(scores.buffer, scores.place(row, number * lanes), lanes))
        before = T.bind(state.top[first + row])
        top = T.bind(T.max(before, work.reduce(0, T.max)))
        T.buffer_store(state.top, top, [first + row])
        factor = T.bind(power(vectors, broadcast(before - top, lanes)))
        store(scores.factors, row * lanes, factor, lanes)
        work[0] = load(state.total, (first + row) * lanes, lanes) * factor
        with T.serial(0, count) as number:
            place = scores.place(row, number * lanes)
            weight = T.bind(power(vectors, load(scores.buffer, place, lanes) - broadcast(top, lanes)))
            work[0] = work[0] + weight
            store(scores.buffer, place, weigh(weight, number), lanes)
        store(state.total, (first + row) * lanes, work[0], lanes)


@dataclass(frozen=True)
class Products:
    """A sum of weighted values: `count` steps, weight(row, step) scalars, value(step, column) vectors from `column` on,
    each step's products added by `multiply`; factor(row) is a vector that the sum so far is scaled by."""

    count: Expr
    multiply: Multiply
    factor: Callable[[Expr], Expr]
    weight: Callable[[Expr, Expr], Expr]
    value: Callable[[Expr, Expr], Expr]


def gather(state: State, first: Expr, rows: int, products: Products) -> None:
    """values[first + row] = values[first + row] * factor(row) + sum over steps s of weight(row, s) * value(s)."""
    lanes = state.plan.lanes
    for vector, columns, repetitions in state.plan.value_columns(rows):
        with T.serial(0, repetitions) as repetition:
            column = T.bind((vector + repetition * columns) * lanes)
            for low, height in parts(rows, state.plan.accumulators // columns):
                _gather_tile(state, first, (low, height, column, columns), products)


def _gather_tile(state: State, first: Expr, tile: tuple[int, int, Expr, int], products: Products) -> None:
    """One tile: (first row, rows, first column, vectors)."""
    lanes, width = state.plan.lanes, state.plan.width
    low, height, column, columns = tile
    sums = Sums(lanes, height, columns)

    def place(row: int, number: int) -> Expr:
        return (first + low + row) * width + column + number * lanes

    sums.fill(lambda row, number: load(state.values, place(row, number), lanes) * products.factor(low + row))
    with T.serial(0, products.count) as s:
        sums.add(
            products.multiply,
            lambda row: products.weight(low + row, s),
            lambda number: products.value(s, column + number * lanes),
        )
    for row in range(height):
        for number, group in enumerate(sums.groups):
            store(state.values, place(row, number), group[row], lanes)
