"""Sums of values of prefill: a block of values in scratch, as float32 or as pairs of bfloat16, times weights."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import Operands
from targets.tvm.kernels.attention_softmax import Softmax
from targets.tvm.kernels.attention_tiles import Products, gather
from targets.tvm.kernels.bf16 import dot, pair
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, broadcast, float_vector, load, store


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


class Bf16Values:
    """Products of bfloat16: values [positions/2][Dp][2]."""

    def __init__(self, operands: Operands, keys: int) -> None:
        self.operands, self.plan = operands, operands.plan
        self.values = T.alloc_buffer((keys // 2 * self.plan.width,), "int32")

    def pack(self, position: Expr, count: Expr) -> None:
        """`count` values from a position of the cache on; where they end inside a pair, a zero follows."""
        plan = self.plan
        with T.serial(0, (count + 1) // 2) as number:
            there = T.bind(T.broadcast(number * 2 + 1 < count, plan.lanes))
            for column in range(0, plan.width, plan.lanes):
                low, high = (cached_value(self.operands, position + number * 2 + half, column) for half in range(2))
                high = T.Select(there, high, float_vector(0.0, plan.lanes))
                store(self.values, number * plan.width + column, pair(low, high), plan.lanes)

    def gather(self, first: Expr, visible: Expr, softmax: Softmax) -> None:
        """Rows first, first + 1, ... of the state take in the `visible` first values."""
        plan = self.plan
        products = Products(
            T.bind((visible + 1) // 2),
            dot,
            softmax.factor,
            lambda row, s: softmax.weights[row * (softmax.keys // 2) + s],
            lambda s, column: load(self.values, s * plan.width + column, plan.lanes),
        )
        gather(softmax.state, first, plan.tile_rows, products)


def cached_value(operands: Operands, position: Expr, column: int) -> Expr:
    """A vector of the value at a position of the cache, scaled."""
    plan = operands.plan
    value = read_cached(operands.vectors, plan.kind, operands.value, position * plan.width + column)
    return value * broadcast(operands.scales[1][position], plan.lanes) if plan.kind.scaled else value
