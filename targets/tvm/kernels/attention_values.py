"""Sums of values of prefill: a block of values in scratch, as float32 or as pairs of 16-bit integers, times weights."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import Operands, parts
from targets.tvm.kernels.attention_softmax import PEAK_BITS, Softmax
from targets.tvm.kernels.attention_tiles import Products, Sums, gather
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, Registers, broadcast, float_vector, int_vector, intrinsic, load, store
from targets.tvm.kernels.short import TINY, add_pairs, pair, rounded


class FloatValues:
    """Products of float32."""

    def __init__(self, operands: Operands, keys: int) -> None:
        self.operands, self.plan = operands, operands.plan
        self.values = T.alloc_buffer((keys * self.plan.width,), "float32")

    def pack(self, position: Expr, count: Expr) -> None:
        """`count` values from a position of the cache on, widened."""
        plan = self.plan
        with T.serial(0, count) as s:
            for column in range(0, plan.width, plan.lanes):
                store(
                    self.values, s * plan.width + column, cached_value(self.operands, position + s, column), plan.lanes
                )

    def gather(self, first: Expr, visible: Expr, softmax: Softmax) -> None:
        """Rows first, first + 1, ... of the state take in the `visible` first values."""
        plan = self.plan
        products = Products(
            visible,
            self.operands.vectors.add_product,
            softmax.factor,
            lambda row, s: softmax.weights[softmax.place(row, s)],
            lambda s, column: load(self.values, s * plan.width + column, plan.lanes),
        )
        gather(softmax.state, first, plan.tile_rows, products)


class ShortValues:
    """Products of 16-bit integers: values [positions/2][Dp][2], each column of the block scaled to a norm.

    `largest`, the norm, times that of a row's weights, of at most 2^PEAK_BITS each, is below 2^31: no sum overflows.
    """

    def __init__(self, operands: Operands, keys: int) -> None:
        self.operands, self.plan = operands, operands.plan
        self.values = T.alloc_buffer((keys // 2 * self.plan.width,), "int32")
        self.scales = T.alloc_buffer((self.plan.width,), "float32")
        self.largest = int(0.99 * 2**31 / (2**PEAK_BITS * keys**0.5))

    def pack(self, position: Expr, count: Expr) -> None:
        """`count` values from a position of the cache on; where they end inside a pair, a zero follows."""
        plan, vectors, lanes = self.plan, self.operands.vectors, self.plan.lanes
        squares = Registers("float32", lanes, 1)
        for column in range(0, plan.width, lanes):
            squares[0] = float_vector(0.0, lanes)
            with T.serial(0, count) as s:
                value = T.bind(cached_value(self.operands, position + s, column))
                squares[0] = vectors.fma(value, value, squares[0])
            norm = T.bind(T.max(intrinsic(vectors.float, "llvm.sqrt", squares[0]), float_vector(TINY, lanes)))
            store(self.scales, column, norm * float_vector(1 / self.largest, lanes), lanes)
            factor = T.bind(float_vector(self.largest, lanes) / norm)
            with T.serial(0, (count + 1) // 2) as number:
                there = T.bind(T.broadcast(number * 2 + 1 < count, lanes))
                low, high = (
                    rounded(vectors, cached_value(self.operands, position + number * 2 + half, column), factor)
                    for half in range(2)
                )
                high = T.Select(there, high, int_vector(0, lanes))
                store(self.values, number * plan.width + column, pair(vectors, low, high), lanes)

    def gather(self, first: Expr, visible: Expr, softmax: Softmax) -> None:
        """Rows first, first + 1, ... of the state take in the `visible` first values."""
        plan = self.plan
        for vector, columns, repetitions in plan.value_columns(plan.tile_rows):
            with T.serial(0, repetitions) as repetition:
                column = T.bind((vector + repetition * columns) * plan.lanes)
                for low, height in parts(plan.tile_rows, plan.accumulators // columns):
                    self._tile(first, T.bind((visible + 1) // 2), softmax, (low, height, column, columns))

    def _tile(self, first: Expr, count: Expr, softmax: Softmax, tile: tuple[int, int, Expr, int]) -> None:
        """One tile: (first row, rows, first column, vectors)."""
        vectors, lanes, width = self.operands.vectors, self.plan.lanes, self.plan.width
        low, height, column, columns = tile
        sums = Sums(lanes, height, columns, "int32")
        sums.fill(lambda row, number: int_vector(0, lanes))
        with T.serial(0, count) as s:
            sums.add(
                lambda total, value, weight: add_pairs(vectors, total, value, weight),
                lambda row: softmax.weights[(low + row) * (softmax.keys // 2) + s],
                lambda number: load(self.values, s * width + column + number * lanes, lanes),
            )
        values = softmax.state.values
        scales = [T.bind(load(self.scales, column + number * lanes, lanes)) for number in range(columns)]
        for row in range(height):
            factor, share = (T.bind(softmax.factor(low + row)), T.bind(softmax.share(low + row)))
            for number, (scale, group) in enumerate(zip(scales, sums.groups, strict=True)):
                place = (first + low + row) * width + column + number * lanes
                new = T.cast(group[row], vectors.float) * scale * share
                store(values, place, vectors.fma(load(values, place, lanes), factor, new), lanes)


def cached_value(operands: Operands, position: Expr, column: int) -> Expr:
    """A vector of the value at a position of the cache, scaled."""
    plan = operands.plan
    value = read_cached(operands.vectors, plan.kind, operands.value, position * plan.width + column)
    return value * broadcast(operands.scales[1][position], plan.lanes) if plan.kind.scaled else value
