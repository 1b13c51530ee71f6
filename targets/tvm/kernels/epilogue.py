"""What happens to the two vectors of a finished block: bias, then stored, added, or gated.

A matrix of N rows is walked in blocks of two vectors. For `plain` and `add` these are 2 * lanes consecutive rows.
For `swiglu` they are `lanes` rows of the gate and the matching rows of the up projection.
"""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.ir import Expr, Registers
from targets.tvm.kernels.partial import load_part, store_part
from targets.tvm.kernels.silu import silu
from targets.tvm.kernels.vector import Vectors

KINDS = ("plain", "add", "swiglu")


class Epilogue:
    """Writes blocks of y; made inside a kernel, once.

    `plain`: y[M, N] = x W^T. `add`: y[M, N] += x W^T. `swiglu`: y[M, N/2] = silu(gate) * up.
    `width` is the row length of y, `blocks` the number of blocks of the matrix.
    """

    def __init__(self, vectors: Vectors, kind: str, rows: int) -> None:
        if kind not in KINDS or (kind == "swiglu" and rows % 2):
            raise ValueError(f"epilogue {kind!r} over {rows} rows")
        self.vectors, self.lanes, self.kind = vectors, vectors.lanes, kind
        self.gated = kind == "swiglu"
        self.width = rows // 2 if self.gated else rows
        self.step = self.lanes if self.gated else 2 * self.lanes
        self.blocks = -(-self.width // self.step)
        self.rest = self.width % self.step
        self.edge = Registers("float32", self.lanes, 2)

    def write(self, y: Expr, row: Expr, block: Expr, values: Registers, first: int, bias: Expr = None) -> None:
        """values[first] and values[first + 1], the block of `row`, go to y; `bias` is the matrix's, float32 [N].

        The registers may be changed. Nothing is read or written beyond the last column.
        """
        if not self.rest:
            self._write(y, row, block, values, first, bias, self.step)
            return
        with T.If(block < self.blocks - 1):
            with T.Then():
                self._write(y, row, block, values, first, bias, self.step)
            with T.Else():
                self._write(y, row, block, values, first, bias, self.rest)

    def _write(self, y: Expr, row: Expr, block: Expr, values: Registers, first: int, bias: Expr, columns: int) -> None:
        lanes, column = self.lanes, block * self.step
        if self.gated:
            self._add_bias(values, first, bias, column, columns)
            self._add_bias(values, first + 1, bias, self.width + column, columns)
            values[first] = silu(self.vectors, values[first], self.edge) * values[first + 1]
            self._store(y, row * self.width + column, values, first, columns)
            return
        for number in range(2):
            count = min(lanes, columns - number * lanes)
            if count > 0:
                self._add_bias(values, first + number, bias, column + number * lanes, count)
                self._store(y, row * self.width + column + number * lanes, values, first + number, count)

    def _add_bias(self, values: Registers, index: int, bias: Expr, column: Expr, count: int) -> None:
        if bias is not None:
            values[index] = values[index] + load_part(bias, column, count, self.edge, 0)

    def _store(self, y: Expr, start: Expr, values: Registers, index: int, count: int) -> None:
        if self.kind == "add":
            values[index] = values[index] + load_part(y, start, count, self.edge, 0)
        store_part(y, start, values[index], count, self.edge, 1)
