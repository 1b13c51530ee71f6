"""Packed weights: the bytes that kernels stream, and where each part of them lies. docs/tvm-kernels.md has a picture.

A matrix [N, K] is stored in blocks of two vectors of rows. Integer blocks are a sequence of records, one for each
group of columns: codes, then float16 scales, then zero points (asymmetric only). Float blocks are transposed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.core.errors import UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.tvm.isa import Isa
from targets.tvm.packing_float import STORAGE, pack_float
from targets.tvm.packing_int import pack_int

ReadRows = Callable[[int, int], QuantizedRows | np.ndarray]
"""Gives source rows [start, stop): QuantizedRows for integer precisions, a float array [n, K] for float ones."""


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
    def group(self) -> int:
        """Columns that share a scale; 1 for float matrices."""
        return self.precision.group_size or 1

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
        """Where a record's float16 scales start."""
        return 2 * self.lanes * self.group * self.precision.bits // 8

    @property
    def zeros_at(self) -> int:
        """Where a record's zero points start."""
        return self.scales_at + 4 * self.lanes

    @property
    def record(self) -> int:
        """Bytes of one group of columns of one block."""
        if not self.precision.is_integer:
            return self.scales_at
        return self.zeros_at + (0 if self.precision.symmetric else 2 * self.lanes)

    @property
    def block_bytes(self) -> int:
        return self.groups * self.record

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def dtype(self) -> str:
        """Type of the packed tensor as kernels see it."""
        return STORAGE.get(self.precision.kind, "uint8")

    @property
    def shape(self) -> tuple[int]:
        """Elements of the packed tensor, which has one dimension."""
        return (self.nbytes // np.dtype(self.dtype).itemsize,)

    @property
    def zero(self) -> int:
        """What a stored code of a symmetric matrix exceeds its value by; asymmetric: its value less the zero point."""
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

        Raises UnsupportedError when a scale exceeds float16.
        """
        if not 0 <= first_block <= first_block + count <= self.blocks:
            raise ValueError(f"blocks {first_block}..{first_block + count} of {self.blocks}")
        parts = [(read(start, stop), wanted) for start, stop, wanted in self.sources(first_block, count)]
        out = np.empty((count, self.groups, self.record), np.uint8)
        for number, (rows, wanted) in enumerate(parts):
            vectors = slice(number, number + 1) if self.interleaved else slice(0, 2)
            if isinstance(rows, QuantizedRows):
                pack_int(self, rows, wanted, out, vectors)
            else:
                pack_float(self, rows, wanted, out, vectors)
        return out.reshape(-1)


def layout(precision: Precision, rows: int, width: int, isa: Isa, interleaved: bool = False) -> Layout:
    """How a matrix [rows, width] is packed for an ISA. Raises UnsupportedError when groups do not divide the width."""
    if precision.is_integer and width % (precision.group_size or 1):
        raise UnsupportedError(
            "tvm.group_size",
            f"groups of {precision.group_size} do not divide a matrix of {width} columns",
            "choose a smaller --group-size",
        )
    if interleaved and rows % 2:
        raise ValueError(f"an interleaved matrix of {rows} rows has no halves")
    return Layout(precision, rows, width, isa.lanes, isa.int8_offset, interleaved)
