"""E2M1 codes as the whole numbers that are multiplied: twice the value plus 12, 0..24, out of a table of 16 bytes."""

from tvm.script.ir_builder import tirx as T

from exporter.core.number_formats import E2M1_LEVELS
from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, intrinsic

OFFSET = 12
LARGEST = 24
SHUFFLES = {
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",
}
"""By bytes of a vector; each looks up within 16 bytes."""


class Levels:
    """The table in a register; made inside a kernel."""

    def __init__(self, isa: Isa) -> None:
        self.isa, self.bytes = isa, 4 * isa.lanes
        self.table = Registers("int32", isa.lanes, 1)
        entries = bytes(int(2 * level) + OFFSET for level in E2M1_LEVELS)
        for lane in range(isa.lanes):
            word = entries[lane % 4 * 4 : lane % 4 * 4 + 4]
            T.buffer_store(self.table.buffer, T.int32(int.from_bytes(word, "little")), [lane])

    def of(self, codes: Expr) -> Expr:
        """uint8 x 4 * lanes: what each code, 0..15, stands for."""
        dtype = f"uint8x{self.bytes}"
        table = T.reinterpret(dtype, self.table[0])
        name = "llvm.aarch64.neon.tbl1.v16i8" if self.isa.machine == "aarch64" else SHUFFLES[self.bytes]
        return intrinsic(dtype, name, table, codes)
