"""Arithmetic on vectors that depends on the instruction set: multiply-add, half floats, exponentials."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, float_vector, int_vector, intrinsic, load

# 2^f on [-1/2, 1/2], relative error below 3e-7 (Taylor coefficients ln(2)^n / n!).
EXP2 = (1.0, 0.69314718056, 0.24022650696, 0.05550410866, 0.00961812911, 0.00133335581, 0.00015403530)
LOG2_E = 1.4426950408889634


class Vectors:
    """float32 and int32 arithmetic on `isa.lanes` lanes."""

    def __init__(self, isa: Isa) -> None:
        self.isa, self.lanes = isa, isa.lanes
        self.float, self.int = f"float32x{isa.lanes}", f"int32x{isa.lanes}"

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c, fused where the hardware does it."""
        return intrinsic(self.float, "llvm.fma", a, b, c) if self.isa.fma else a * b + c

    def add_product(self, total: Expr, a: Expr, b: Expr) -> Expr:
        """total + a * b."""
        return self.fma(a, b, total)

    def rint(self, x: Expr) -> Expr:
        """Nearest whole number, ties to even."""
        return intrinsic(self.float, "llvm.rint", x)

    def abs(self, x: Expr) -> Expr:
        return intrinsic(self.float, "llvm.fabs", x)

    def load_half(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector from `lanes` float16 values of a flat float16 buffer."""
        bits = load(buffer, first, self.lanes)
        return T.cast(bits, self.float) if self.isa.half else self._widen(T.reinterpret(f"uint16x{self.lanes}", bits))

    def half_from_bytes(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector from 2 * `lanes` bytes of a flat uint8 buffer that hold float16 values."""
        raw = load(buffer, first, 2 * self.lanes)
        if self.isa.half:
            return T.cast(T.reinterpret(f"float16x{self.lanes}", raw), self.float)
        return self._widen(T.reinterpret(f"uint16x{self.lanes}", raw))

    def power_from_bytes(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector of powers of two from `lanes` E8M0 bytes of a flat uint8 buffer; 0 is read as zero."""
        bits = T.cast(load(buffer, first, self.lanes), self.int)
        return T.reinterpret(self.float, T.shift_left(bits, int_vector(23, self.lanes)))

    def e4m3_from_bytes(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector of E4M3 values times 2^-8 from `lanes` bytes of a flat uint8 buffer: as float16, whose
        exponents are one bit longer, their bits mean just that."""
        shorts = f"uint16x{self.lanes}"
        wide = T.cast(load(buffer, first, self.lanes), shorts)
        magnitude = T.bitwise_and(wide, T.broadcast(T.uint16(0x7F), self.lanes))
        sign = T.bitwise_and(wide, T.broadcast(T.uint16(0x80), self.lanes))
        bits = T.bitwise_or(
            T.shift_left(magnitude, T.broadcast(T.uint16(7), self.lanes)),
            T.shift_left(sign, T.broadcast(T.uint16(8), self.lanes)),
        )
        return T.cast(T.reinterpret(f"float16x{self.lanes}", bits), self.float) if self.isa.half else self._widen(bits)

    def floats_from_bytes(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector from 4 * `lanes` bytes of a flat uint8 buffer."""
        return T.reinterpret(self.float, load(buffer, first, 4 * self.lanes))

    def load_bfloat(self, buffer: Expr, first: Expr) -> Expr:
        """float32 vector from `lanes` bfloat16 values of a flat uint16 buffer."""
        bits = T.cast(load(buffer, first, self.lanes), self.int)
        return T.reinterpret(self.float, T.shift_left(bits, int_vector(16, self.lanes)))

    def _widen(self, bits: Expr) -> Expr:
        """float16 to float32 with integer instructions: move the bits, then mend the exponent, exactly."""
        wide = T.cast(bits, self.int)
        magnitude = T.shift_left(T.bitwise_and(wide, int_vector(0x7FFF, self.lanes)), int_vector(13, self.lanes))
        sign = T.shift_left(T.bitwise_and(wide, int_vector(0x8000, self.lanes)), int_vector(16, self.lanes))
        scaled = T.reinterpret(self.float, magnitude) * float_vector(2.0**112, self.lanes)
        return T.reinterpret(self.float, T.bitwise_or(T.reinterpret(self.int, scaled), sign))

    def exp2(self, x: Expr) -> Expr:
        """2^x for x in [-126, 127]; callers clamp. Relative error below 1e-6. Name `x` a register: it is read often."""
        whole = self.rint(x)
        rest = x - whole
        value = float_vector(EXP2[-1], self.lanes)
        for coefficient in reversed(EXP2[:-1]):
            value = self.fma(value, rest, float_vector(coefficient, self.lanes))
        exponent = T.shift_left(T.cast(whole, self.int) + int_vector(127, self.lanes), int_vector(23, self.lanes))
        return value * T.reinterpret(self.float, exponent)
