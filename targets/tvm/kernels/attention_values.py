"""Sums of values of prefill: a block of values in scratch, as float32, times weights."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.attention_plan import Operands
from targets.tvm.kernels.attention_softmax import Softmax
from targets.tvm.kernels.attention_tiles import Products, gather
from targets.tvm.kernels.cache_values import read_cached
from targets.tvm.kernels.ir import Expr, broadcast, load, store


class BlockValues:
    """One thread's scratch: `keys` values."""

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
            lambda row, s: softmax.scores[softmax.place(row, s)],
            lambda s, column: load(self.values, s * plan.width + column, plan.lanes),
        )
        gather(softmax.state, first, plan.tile_rows, products)


def cached_value(operands: Operands, position: Expr, column: int) -> Expr:
    """A vector of the value at a position of the cache, scaled."""
    plan = operands.plan
    value = read_cached(operands.vectors, plan.kind, operands.value, position * plan.width + column)
    return value * broadcast(operands.scales[1][position], plan.lanes) if plan.kind.scaled else value
