"""Float matrices: y = x W^T in float32 from weights stored as fp32, bf16, fp16 or fp8, for any number of rows.

One row streams the weights. More rows are first transposed into tiles [K][rows of a tile]; every task then walks
blocks of the matrix, and all tiles pass while the block lies in the second-level cache.
"""

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.formats import float_precision
from targets.tvm.isa import Isa
from targets.tvm.kernels.embedding import load_floats
from targets.tvm.kernels.epilogue import Epilogue
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, float_vector, kernel, load, size, store
from targets.tvm.kernels.vector import Vectors
from targets.tvm.kernels.weight_scales import block_factors
from targets.tvm.packing import Layout, layout

CHAINS = 4
"""Columns of a single row that are summed apart: one chain would wait for the multiplier."""
UNROLL = 4
"""Columns of a tile's inner loop."""


def float_tiles(isa: Isa) -> tuple[int, ...]:
    """Rows that a tile may have, ascending: two vectors of sums a row must fit the registers, and the weights."""
    if isa.registers >= 32:
        return (3, 6, 9, 12)
    return (2, 4, 6) if isa.fma else (2, 4)


def linear_float(isa: Isa, name: str, kind: str, rows: int, width: int, epilogue: str, bias: bool) -> tirx.PrimFunc:
    """x float32 [M, K], weights (packed [N, K] of `kind`, see formats.float_precision), (bias float32 [N]) -> y.

    `epilogue`: see Epilogue; with `swiglu` the matrix is interleaved. Sums are float32.
    """
    packed, m = layout(float_precision(kind), rows, width, isa, epilogue == "swiglu"), size("m")
    shapes: dict[str, tuple[tuple[Expr, ...], str]] = {
        "x": ((m, width), "float32"),
        "weights": (packed.shape, packed.dtype),
        **({"bias": ((rows,), "float32")} if bias else {}),
        "y": ((m, rows // 2 if epilogue == "swiglu" else rows), "float32"),
    }
    with kernel(name) as finished:
        tensors = dict(zip(shapes, arguments(**shapes), strict=True))
        product = _Product(isa, packed, Epilogue(Vectors(isa), epilogue, rows), tensors)
        with T.If(m == 1):
            with T.Then(), T.parallel(0, packed.blocks) as block:
                product.single_row(block)
            with T.Else():
                product.many_rows(m)
    return finished()


class _Product:
    """Emits the product; made inside a kernel."""

    def __init__(self, isa: Isa, packed: Layout, epilogue: Epilogue, tensors: dict[str, Expr]) -> None:
        self.packed, self.epilogue, self.tensors = packed, epilogue, tensors
        self.vectors, self.lanes, self.sizes = Vectors(isa), isa.lanes, float_tiles(isa)
        self.columns = 2 * isa.lanes

    def single_row(self, block: Expr) -> None:
        """One block of y from x [1, K]."""
        start = T.bind(block * self.packed.block_values)
        # Behind fp8 products activations are rounded to 4 bits: single rows must add as tiles do, to the last bit.
        chains = 1 if self.packed.kind == "fp8" else CHAINS
        sums = Registers("float32", self.lanes, 2 * chains)
        for index in range(2 * chains):
            sums[index] = float_vector(0.0, self.lanes)

        def add(column: Expr, chain: int) -> None:
            x = broadcast(self.tensors["x"][column], self.lanes)
            for vector in range(2):
                index = 2 * chain + vector
                sums[index] = self.vectors.fma(self._weights(start, column, vector), x, sums[index])

        with T.serial(0, self.packed.width // CHAINS) as step:
            for number in range(CHAINS):
                add(step * CHAINS + number, number % chains)
        for number in range(self.packed.width % CHAINS):
            add(self.packed.width // CHAINS * CHAINS + number, number % chains)
        for index in (0, 1):
            if chains > 1:
                sums[index] = (sums[index] + sums[index + 2]) + (sums[index + 4] + sums[index + 6])
            sums[index] = self._scaled(sums[index], block, index)
        self.epilogue.write(self.tensors["y"], T.int64(0), block, sums, 0, self.tensors.get("bias"))

    def many_rows(self, m: Expr) -> None:
        """All of y, in tiles of nearly equal height."""
        largest, width = self.sizes[-1], self.packed.width
        tiles = T.bind(T.truncdiv(m + (largest - 1), T.int64(largest)))
        height = T.bind(self._round(T.truncdiv(m + tiles - 1, tiles)))
        used = T.bind(T.truncdiv(m + height - 1, height))
        turned = T.alloc_buffer((used * height * width,), "float32")
        with T.parallel(0, used) as tile:
            first = T.bind(tile * height)
            self._transpose(turned, first, T.bind(self._round(T.min(height, m - first))), m)
        with T.parallel(0, self.packed.blocks) as block, T.serial(0, used) as tile:
            first = T.bind(tile * height)
            count = T.bind(T.min(height, m - first))
            rounded = T.bind(self._round(count))
            for rows in self.sizes:
                with T.If(rounded == rows), T.Then():
                    self._tile(turned, rows, first, count, block)

    def _round(self, count: Expr) -> Expr:
        """The smallest tile that holds `count` rows."""
        step = self.sizes[0]
        return T.truncdiv(count + (step - 1), T.int64(step)) * step

    def _transpose(self, turned: Expr, first: Expr, rows: Expr, m: Expr) -> None:
        """x [rows, K] from row `first` on -> [K][rows]; zeros where x has no more rows."""
        width = self.packed.width
        with T.serial(0, rows) as row, T.If(first + row < m):
            with T.Then(), T.serial(0, width) as column:
                store(
                    turned,
                    first * width + column * rows + row,
                    self.tensors["x"][(first + row) * width + column],
                    1,
                )
            with T.Else(), T.serial(0, width) as column:
                store(turned, first * width + column * rows + row, T.float32(0), 1)

    def _tile(self, turned: Expr, rows: int, first: Expr, count: Expr, block: Expr) -> None:
        """y[first .. first + count] of a block, computed for `rows` rows."""
        width, lanes = self.packed.width, self.lanes
        start = T.bind(block * self.packed.block_values)
        sums = [Registers("float32", lanes, rows) for _ in range(2)]
        weights = Registers("float32", lanes, 2)
        for row in range(rows):
            for vector in range(2):
                sums[vector][row] = float_vector(0.0, lanes)

        def add(column: Expr) -> None:
            for vector in range(2):
                weights[vector] = self._weights(start, column, vector)
            for row in range(rows):
                x = broadcast(turned[first * width + column * rows + row], lanes)
                for vector in range(2):
                    sums[vector][row] = self.vectors.fma(weights[vector], x, sums[vector][row])

        with T.serial(0, width // UNROLL) as step:
            for number in range(UNROLL):
                add(step * UNROLL + number)
        for number in range(width % UNROLL):
            add(width // UNROLL * UNROLL + number)
        self._write(sums, rows, first, count, block)

    def _write(self, sums: list[Registers], rows: int, first: Expr, count: Expr, block: Expr) -> None:
        """Through memory, so that the epilogue is emitted once for all rows of a tile."""
        finished = [Registers("float32", self.lanes, rows) for _ in range(2)]
        values = Registers("float32", self.lanes, 2)
        for vector in range(2):
            for row in range(rows):
                finished[vector][row] = self._scaled(sums[vector][row], block, vector)
        with T.serial(0, count) as row:
            for vector in range(2):
                values[vector] = load(finished[vector].buffer, row * self.lanes, self.lanes)
            self.epilogue.write(self.tensors["y"], first + row, block, values, 0, self.tensors.get("bias"))

    def _scaled(self, sums: Expr, block: Expr, vector: int) -> Expr:
        """Sums of one vector of rows of a block, times the factors of the rows where they have some."""
        if not self.packed.row_scaled:
            return sums
        return sums * block_factors(self.vectors, self.packed, self.tensors["weights"], block, vector)

    def _weights(self, start: Expr, column: Expr, vector: int) -> Expr:
        at = start + column * self.columns + vector * self.lanes
        return load_floats(self.vectors, self.packed.kind, self.tensors["weights"], at)
