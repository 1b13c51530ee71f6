"""Packed weights: the bytes that kernels stream, and where each part of them lies. docs/tvm-kernels.md has a picture.

A matrix [N, K] is stored in blocks of two vectors of rows. Blocks of what is multiplied as integers are a sequence of
records, one for each group of columns: codes, then scales, then zero points (asymmetric only). Blocks of floats are
transposed. fp8 and nvfp4 have a float32 factor for each row at the end of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.core.errors import UnsupportedError
from exporter.core.recipe import BITS, Precision
from exporter.core.weights import QuantizedRows
from targets.tvm.formats import (
    E2M1,
    ROW_SCALED,
    TABLED,
    factor_bytes,
    multiplies_integers,
    scale_bytes,
    stored_group,
    zero_point_bytes,
)
from targets.tvm.isa import Isa
from targets.tvm.packing_float import STORAGE, pack_float, pack_fp8
from targets.tvm.packing_int import pack_int

ReadRows = Callable[[int, int], QuantizedRows | np.ndarray]
"""Gives source rows [start, stop): QuantizedRows for coded precisions, a float array [n, K] for float ones."""


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed matrix [rows, width] lie. Offsets and sizes are bytes unless named otherwise.

    `interleaved`: the matrix is gate over up, and a block is one vector of gate rows and the matching one of up rows;
    otherwise it is two consecutive vectors of rows. Rows are filled up with zeros to whole blocks.
    """

    precision: Precision
    rows: int
    width: int
    lanes: int
    int8_offset: int
    interleaved: bool = False

    @property
    def step(self) -> int:
        """Rows of the result that one block covers."""
        return self.lanes if self.interleaved else 2 * self.lanes

    @property
    def blocks(self) -> int:
        return -(-(self.rows // 2 if self.interleaved else self.rows) // self.step)

    @property
    def integers(self) -> bool:
        """Whether it is multiplied by int8 activations."""
        return multiplies_integers(self.precision)

    @property
    def kind(self) -> str:
        return self.precision.kind

    @property
    def group(self) -> int:
        """Columns of a record; 1 for float matrices."""
        return stored_group(self.precision, self.width)

    @property
    def groups(self) -> int:
        return self.width // self.group

    @property
    def chunk(self) -> int:
        """Columns whose codes lie in the same vectors."""
        return {4: 8, 6: 16, 8: 4}[self.precision.bits]

    @property
    def vectors(self) -> int:
        """Vectors of codes of a chunk and row vector. Vector v of chunk c of row vector r is vector
        2 * (c * vectors + v) + r of the record."""
        return self.chunk * self.precision.bits // 32

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector of codes: 4 of each lane's row."""
        return 4 * self.lanes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the codes of a chunk of both row vectors."""
        return 2 * self.vectors * self.vector_bytes

    @property
    def scales_at(self) -> int:
        """Where a record's scales start."""
        return 2 * self.lanes * self.group * BITS[self.kind] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale in a record; none of floats."""
        return scale_bytes(self.precision)

    @property
    def zeros_at(self) -> int:
        """Where a record's zero points start."""
        return self.scales_at + 2 * self.lanes * self.scale_bytes

    @property
    def record(self) -> int:
        """Bytes of one group of columns of one block."""
        return self.zeros_at + 2 * self.lanes * zero_point_bytes(self.precision)

    @property
    def row_scaled(self) -> bool:
        """Whether a block ends with a float32 factor for each of its rows."""
        return self.precision.kind in ROW_SCALED

    @property
    def factors_at(self) -> int:
        """Where a block's factors start."""
        return self.groups * self.record

    @property
    def block_bytes(self) -> int:
        return self.factors_at + 2 * self.lanes * factor_bytes(self.precision)

    @property
    def block_values(self) -> int:
        """Elements of the packed tensor that a block takes."""
        return self.block_bytes // np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def dtype(self) -> str:
        """Type of the packed tensor as kernels see it."""
        return STORAGE.get(self.kind, "uint8")

    @property
    def shape(self) -> tuple[int]:
        """Elements of the packed tensor, which has one dimension."""
        return (self.nbytes // np.dtype(self.dtype).itemsize,)

    @property
    def zero(self) -> int:
        """What a multiplied code exceeds its value by where the matrix is symmetric, else its value less the zero
        point."""
        if self.kind in TABLED:
            return 12 if self.kind in E2M1 else self.int8_offset
        if self.precision.bits < 8:
            return 1 << (self.precision.bits - 1) if self.precision.symmetric else 0
        return self.int8_offset - (0 if self.precision.symmetric else 128)

    def sources(self, first_block: int, count: int) -> list[tuple[int, int, int]]:
        """The rows in blocks [first_block, first_block + count): (start, stop, filled up to) of each half or of all."""
        first, wanted = first_block * self.step, count * self.step
        if not self.interleaved:
            return [(first, min(first + wanted, self.rows), wanted)]
        half = self.rows // 2
        stop = min(first + wanted, half)
        return [(first, stop, wanted), (half + first, half + stop, wanted)]

    def pack(self, first_block: int, count: int, read: ReadRows) -> np.ndarray:
        """Bytes uint8 [count * block_bytes] of some blocks; `read` is asked once for the rows of each source.

        Raises UnsupportedError when a scale or a value is not what the format holds.
        """
        if not 0 <= first_block <= first_block + count <= self.blocks:
            raise ValueError(f"blocks {first_block}..{first_block + count} of {self.blocks}")
        parts = [(read(start, stop), wanted) for start, stop, wanted in self.sources(first_block, count)]
        out = np.empty((count, self.block_bytes), np.uint8)
        for number, (rows, wanted) in enumerate(parts):
            vectors = slice(number, number + 1) if self.interleaved else slice(0, 2)
            self._pack(rows, wanted, out, vectors)
        return out.reshape(-1)

    def _pack(self, rows: QuantizedRows | np.ndarray, wanted: int, out: np.ndarray, vectors: slice) -> None:
        """Rows [n <= wanted, K] go into `vectors` (0..1) of out uint8 [blocks, block_bytes]; zeros behind."""
        if not isinstance(rows, QuantizedRows):
            pack_float(self, rows, wanted, out, vectors)
        elif self.integers:
            pack_int(self, rows, wanted, out, vectors)
        else:
            pack_fp8(self, rows, wanted, out, vectors)


def layout(precision: Precision, rows: int, width: int, isa: Isa, interleaved: bool = False) -> Layout:
    """How a matrix [rows, width] is packed for an ISA. Raises UnsupportedError when groups do not divide the width."""
    if (group := stored_group(precision, width)) == 0 or width % group:
        whose = f"groups of {precision.group_size} do not divide" if group else "no group of the kernels divides"
        raise UnsupportedError(
            "tvm.group_size",
            f"{whose} a matrix of {width} columns",
            "choose a smaller --group-size" if group else "keep this matrix in a float precision",
        )
    if interleaved and rows % 2:
        raise ValueError(f"an interleaved matrix of {rows} rows has no halves")
    return Layout(precision.weight_only, rows, width, isa.lanes, isa.int8_offset, interleaved)
