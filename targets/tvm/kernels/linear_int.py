"""Integer matrices: y = x W^T on int8 activations, straight from the packed weight stream, for any number of rows.

Every task walks blocks of the matrix; for one block, all rows of activations pass in tiles of `rows_per_tile`, and
the rest in a smaller tile. The first tile streams the block from memory, the others find it in the second-level cache.
"""

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from exporter.core.recipe import Precision
from targets.tvm.activations import activation_rounding, has_base
from targets.tvm.isa import Isa
from targets.tvm.kernels.activation_scales import scaled
from targets.tvm.kernels.dot import Dots, dots, unpacked
from targets.tvm.kernels.epilogue import Epilogue
from targets.tvm.kernels.ir import (
    Expr,
    Registers,
    arguments,
    broadcast,
    float_vector,
    int_vector,
    kernel,
    load,
    prefetch,
    size,
)
from targets.tvm.kernels.levels import Table, largest_number, planes
from targets.tvm.kernels.tile import rows_per_tile
from targets.tvm.kernels.vector import Vectors
from targets.tvm.kernels.weight_scales import block_factors, record_scales
from targets.tvm.packing import Layout, layout
from targets.tvm.tuning import DEFAULT, Tuning


def linear_int(
    isa: Isa,
    name: str,
    precision: Precision,
    rows: int,
    width: int,
    epilogue: str,
    bias: bool,
    tuning: Tuning = DEFAULT,
) -> tirx.PrimFunc:
    """codes int32 [M, K/4], scales float32 [M, G], sums int32 [M, G], weights uint8, (bias float32 [N]) -> y.

    Where activations have a base (activations.py): codes, shifts int32 [M, G], sums, bases float32 [M], weights, ...
    Activations are packed by rows as tile.py says, weights as packing.py. `epilogue`: see Epilogue; with `swiglu` the
    matrix is interleaved. Sums of products within a group are exact integers; groups are added in float32, in order.
    """
    packed = layout(precision, rows, width, isa, epilogue == "swiglu")
    m, exponents = size("m"), has_base(activation_rounding(precision))
    y_width = rows // 2 if epilogue == "swiglu" else rows
    shapes: dict[str, tuple[tuple[Expr, ...], str]] = {
        "codes": ((m, width // 4), "int32"),
        "scales": ((m, packed.groups), "int32" if exponents else "float32"),
        "sums": ((m, packed.groups), "int32"),
        **({"bases": ((m,), "float32")} if exponents else {}),
        "weights": (packed.shape, packed.dtype),
        **({"bias": ((rows,), "float32")} if bias else {}),
        "y": ((m, y_width), "float32"),
    }
    with kernel(name) as finished:
        tensors = dict(zip(shapes, arguments(**shapes), strict=True))
        product = Product(isa, packed, Epilogue(Vectors(isa), epilogue, rows), tensors, m, tuning.prefetch)
        with T.parallel(0, packed.blocks) as block:
            _every_row(rows_per_tile(isa, tuning), m, lambda count, first: product.tile(count, first, block))
    return finished()


def _every_row(tile: int, m: Expr, emit: Callable[[int, Expr], None]) -> None:
    """emit(rows of a tile, its first row) for full tiles, then for the rest."""
    with T.serial(0, m // tile) as number:
        emit(tile, number * tile)
    for rest in range(1, tile):
        with T.If(m % tile == rest), T.Then():
            emit(rest, m - rest)


class Product:
    """Emits tiles: some rows of activations times one block of the matrix."""

    def __init__(
        self, isa: Isa, packed: Layout, epilogue: Epilogue, tensors: dict[str, Expr], m: Expr, ahead: int
    ) -> None:
        self.isa, self.packed, self.epilogue, self.tensors = isa, packed, epilogue, tensors
        self.vectors, self.lanes, self.m, self.ahead = Vectors(isa), isa.lanes, m, ahead
        self.bits = packed.precision.bits
        self.largest = largest_number(packed.kind)
        self.piece = min(packed.group, 32)  # columns that are unrolled

    def tile(self, rows: int, first: Expr, block: Expr) -> None:
        """y[first .. first + rows] of a block; `first` may be a TIR expression."""
        packed = self.packed
        outputs = Registers("float32", self.lanes, 2 * rows)
        scales = Registers("float32", self.lanes, 2)
        # A single row has too few sums to keep the multipliers busy: every second word goes to a second set.
        chains = 2 if rows == 1 else 1
        sums = dots(self.isa, self.largest, 2 * rows * chains, 2)
        passes = [
            (plane.factor, Table(self.isa, plane)) if plane else (1.0, None) for plane in planes(packed.kind, self.isa)
        ]
        for index in range(2 * rows):
            outputs[index] = float_vector(0.0, self.lanes)
        with T.serial(0, packed.groups) as group:
            record = block * packed.block_bytes + group * packed.record
            at = first * packed.groups + group * rows
            words = first * (packed.width // 4) + group * (packed.group // 4 * rows)
            for factor, table in passes:
                self._start(sums, rows, chains, record, at)
                self._pieces(sums, table, rows, chains, record, words)
                self._load_scales(scales, record, factor)
                self._add(sums, scales, outputs, rows, chains, at)
        self._finish(outputs, scales, rows, first, block)

    def _load_scales(self, scales: Registers, record: Expr, factor: float) -> None:
        """The weight scales of a record, times a number."""
        packed, weights = self.packed, self.tensors["weights"]
        for vector in range(2):
            found = record_scales(self.vectors, packed, weights, record, vector)
            scales[vector] = found if factor == 1 else found * float_vector(factor, self.lanes)
        prefetch(weights, record + packed.scales_at + self.ahead)

    def _add(self, sums: Dots, scales: Registers, outputs: Registers, rows: int, chains: int, at: Expr) -> None:
        """The sums of a group, times both scales, onto the outputs."""
        for index in range(2 * rows):
            total = sums.total(index)
            for chain in range(1, chains):
                total = total + sums.total(index + 2 * rows * chain)
            stored = self.tensors["scales"][at + index // 2]
            scale = scaled(self.vectors, stored, scales[index % 2], "bases" in self.tensors)
            outputs[index] = self.vectors.fma(T.cast(total, self.vectors.float), scale, outputs[index])

    def _finish(self, outputs: Registers, scales: Registers, rows: int, first: Expr, block: Expr) -> None:
        """What is applied once at the end: bases of activations, factors of weights, the epilogue."""
        packed, tensors = self.packed, self.tensors
        for vector in range(2 if packed.row_scaled else 0):
            scales[vector] = block_factors(self.vectors, packed, tensors["weights"], block, vector)
        for row in range(rows):
            for index in (2 * row, 2 * row + 1):
                if "bases" in tensors:
                    outputs[index] = outputs[index] * broadcast(tensors["bases"][first + row], self.lanes)
                if packed.row_scaled:
                    outputs[index] = outputs[index] * scales[index % 2]
            self.epilogue.write(tensors["y"], first + row, block, outputs, 2 * row, tensors.get("bias"))

    def _start(self, sums: Dots, rows: int, chains: int, record: Expr, at: Expr) -> None:
        """Sums begin with what the codes' offset and zero points contribute."""
        packed, lanes = self.packed, self.lanes
        zeros = None
        if not packed.precision.symmetric:
            zeros = Registers("int32", lanes, 2)
            for vector in range(2):
                stored = load(self.tensors["weights"], record + packed.zeros_at + lanes * vector, lanes)
                zeros[vector] = int_vector(-packed.zero, lanes) - T.cast(stored, self.vectors.int)
        for index in range(2 * rows * chains):
            sums.start(index, int_vector(0, lanes))
            if index >= 2 * rows:
                continue
            total = self.tensors["sums"][at + index // 2]
            if zeros is not None:
                sums.start(index, zeros[index % 2] * broadcast(total, lanes))
            elif packed.zero:
                sums.start(index, broadcast(total * -packed.zero, lanes))

    def _pieces(self, sums: Dots, table: Table | None, rows: int, chains: int, record: Expr, words: Expr) -> None:
        """All columns of a group, `piece` of them unrolled."""
        count = self.packed.group // self.piece
        if count == 1:
            self._piece(sums, table, rows, chains, record, words)
            return
        with T.serial(0, count) as number:
            start = record + number * (self.piece // self.packed.chunk * self.packed.chunk_bytes)
            self._piece(sums, table, rows, chains, start, words + number * (self.piece // 4 * rows))

    def _piece(self, sums: Dots, table: Table | None, rows: int, chains: int, start: Expr, words: Expr) -> None:
        """`piece` columns: stored words from `start` on, activations at `words`."""
        chunks = self.piece // self.packed.chunk
        if sums.unrolled or rows == 1 or rows * self.packed.chunk // 4 <= 2:
            for chunk in range(chunks):
                self._chunk(sums, table, rows, chains, start, words, chunk)
        else:
            # The bound is `chunks`, m being less than 2^40, but LLVM does not know it and so keeps the loop.
            sums.open()
            with T.serial(0, T.max(chunks, T.shift_right(self.m, T.int64(40)))) as chunk:
                self._chunk(sums, table, rows, chains, start, words, chunk)
        sums.close()

    def _chunk(
        self, sums: Dots, table: Table | None, rows: int, chains: int, start: Expr, words: Expr, chunk: Expr
    ) -> None:
        """The columns of a chunk of both row vectors."""
        packed, steps, size = self.packed, self.packed.chunk // 4, self.packed.vector_bytes
        stored = Registers("uint8", size, 2 * packed.vectors)
        for number in range(2 * packed.vectors):
            at = start + chunk * packed.chunk_bytes + number * size
            stored[number] = load(self.tensors["weights"], at, size)
            if number % 2 == 0 or size == 64:
                prefetch(self.tensors["weights"], at + self.ahead)
        for part in range(steps):
            for vector in range(2):
                vectors = [stored[2 * number + vector] for number in range(packed.vectors)]
                codes = unpacked(self.bits, vectors, self.lanes, part)
                sums.weigh(vector, table.of(codes) if table else codes)
            step = chunk * steps + part
            for row in range(rows):
                word = self.tensors["codes"][words + step * rows + row]
                for vector in range(2):
                    index = 2 * row + vector + (2 * rows * (step % chains) if chains > 1 else 0)
                    sums.add(index, vector, word)
