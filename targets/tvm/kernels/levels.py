"""4-bit codes as the whole numbers that are multiplied, looked up in tables of 16 bytes.

E2M1: twice the value plus 12, 0..24. NF4: round(32512 * level) in two bytes, high and low, each -128..127, so that a
product is two passes of byte products; a level is off by less than 1.6e-5.
"""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from exporter.core.number_formats import E2M1_LEVELS, NF4_LEVELS
from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, intrinsic

E2M1_OFFSET = 12
NF4_UNIT = 127 * 256
SHUFFLES = {
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",
}
"""By bytes of a vector; each looks up within 16 bytes."""


def largest_number(kind: str) -> int:
    """The largest that a pass multiplies, counted from 0, by the kind of weights; 255 stands for any signed byte."""
    return {"int4": 15, "int6": 63, "nvfp4": 24, "mxfp4": 24}.get(kind, 255)


@dataclass(frozen=True)
class Plane:
    """What a pass of byte products takes for each of 16 codes; sums of it are multiplied by `factor`."""

    entries: tuple[int, ...]
    factor: float


def planes(kind: str, isa: Isa) -> tuple[Plane | None, ...]:
    """The passes over a record of a kind of weights; None for one over the codes themselves."""
    if kind in ("nvfp4", "mxfp4"):
        return (Plane(tuple(int(2 * level) + E2M1_OFFSET for level in E2M1_LEVELS), 1.0),)
    if kind != "nf4":
        return (None,)
    numbers = [round(NF4_UNIT * level) for level in NF4_LEVELS]
    low = [(number + 128) % 256 - 128 for number in numbers]
    high = [(number - rest) // 256 for number, rest in zip(numbers, low, strict=True)]
    stored = (tuple((value + isa.int8_offset) % 256 for value in part) for part in (high, low))
    return tuple(Plane(entries, factor / NF4_UNIT) for entries, factor in zip(stored, (256, 1), strict=True))


class Table:
    """A plane's table in a register; made inside a kernel."""

    def __init__(self, isa: Isa, plane: Plane) -> None:
        self.isa, self.bytes = isa, 4 * isa.lanes
        self.words = Registers("int32", isa.lanes, 1)
        for lane in range(isa.lanes):
            word = bytes(plane.entries)[lane % 4 * 4 : lane % 4 * 4 + 4]
            T.buffer_store(self.words.buffer, T.int32(int.from_bytes(word, "little", signed=True)), [lane])

    def of(self, codes: Expr) -> Expr:
        """uint8 x 4 * lanes: what each code, 0..15, stands for."""
        dtype = f"uint8x{self.bytes}"
        name = "llvm.aarch64.neon.tbl1.v16i8" if self.isa.machine == "aarch64" else SHUFFLES[self.bytes]
        return intrinsic(dtype, name, T.reinterpret(dtype, self.words[0]), codes)
