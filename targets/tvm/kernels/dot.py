"""Products of bytes, summed in 32 bits: what each instruction set offers for it, behind one interface.

Weights are a vector of bytes, four consecutive columns in each 32-bit lane (one lane a row of the matrix);
activations are one 32-bit word of four codes, -127..127. int4 weights are 0..15, int6 ones 0..63, E2M1 ones 0..24
(levels.py). int8 weights are unsigned bytes on VNNI, signed ones elsewhere.
"""

from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, int_vector, intrinsic, load


def dots(isa: Isa, largest: int, sums: int, weights: int) -> "Dots":
    """`sums` accumulators and `weights` weight vectors for an ISA; `largest` is that of the codes, 255 for int8."""
    if isa.dot == "vnni":
        return Vnni(isa, sums, weights)
    if isa.dot in ("sdot", "smmla"):
        return Sdot(isa, sums, weights)
    if isa.dot == "smull":
        return Smull(isa, sums, weights, depth={15: 16, 24: 10, 63: 4, 255: 2}[largest])
    if isa.dot == "maddubs":
        if largest == 255:
            return SignedMaddubs(isa, sums, weights)
        return Maddubs(isa, sums, weights, depth={15: 8, 24: 2, 63: 2}[largest])
    raise ValueError(f"no byte products for {isa.dot!r}")


class Dots:
    """Accumulators that add products of a weight vector and a word of activations.

    `start` an accumulator, `weigh` a vector, `add` products, `close` after every unrolled run of at most 8 steps;
    `total` is the int32 vector. Where `unrolled` is false, steps stand in a loop, after `open`.
    """

    unrolled = True

    def __init__(self, isa: Isa, sums: int, weights: int) -> None:
        self.isa, self.lanes = isa, isa.lanes
        self.sums = Registers("int32", isa.lanes, sums)
        self.weights = Registers("uint8", 4 * isa.lanes, weights)

    def start(self, index: int, value: Expr) -> None:
        self.sums[index] = value

    def weigh(self, slot: int, codes: Expr) -> None:
        """Name a vector of weight codes, uint8 x 4 * lanes."""
        self.weights[slot] = codes

    def add(self, index: int, slot: int, word: Expr) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Bring everything into 32 bits."""

    def open(self) -> None:
        """Before a loop of steps."""

    def total(self, index: int) -> Expr:
        return self.sums[index]

    def _word(self, word: Expr, lanes: int = 0) -> Expr:
        lanes = lanes or self.lanes
        return T.reinterpret(f"int8x{4 * lanes}", T.broadcast(word, lanes))

    def _signed(self, slot: int) -> Expr:
        return T.reinterpret(f"int8x{4 * self.lanes}", self.weights[slot])


class Vnni(Dots):
    """x86 VNNI: four unsigned x signed products a lane and instruction."""

    def add(self, index: int, slot: int, word: Expr) -> None:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        self.sums[index] = intrinsic(
            f"int32x{self.lanes}", name, self.sums[index], self.weights[slot], self._word(word)
        )


class Sdot(Dots):
    """aarch64 dot product: four signed products a lane and instruction."""

    def add(self, index: int, slot: int, word: Expr) -> None:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        self.sums[index] = intrinsic("int32x4", name, self.sums[index], self._signed(slot), self._word(word))


class Narrow(Dots):
    """Sums of 16 bits that are widened before they could overflow: every `depth` steps, and when closed."""

    def __init__(self, isa: Isa, sums: int, weights: int, depth: int, parts: int) -> None:
        super().__init__(isa, sums, weights)
        self.depth = depth
        self.steps: dict[int, int] = {}
        self.starts: dict[int, Expr] = {}
        self.narrow = [Registers("int16", 2 * isa.lanes, sums) for _ in range(parts)]

    def start(self, index: int, value: Expr) -> None:
        # Added at the end: until then it would hold a register, and there are few.
        self.starts[index] = value
        super().start(index, int_vector(0, self.lanes))

    def total(self, index: int) -> Expr:
        return self.sums[index] + self.starts[index]

    def add(self, index: int, slot: int, word: Expr) -> None:
        steps = self.steps.get(index, 0)
        for part, products in zip(self.narrow, self._products(slot, word), strict=True):
            part[index] = part[index] + products if steps else products
        self.steps[index] = steps + 1
        if self.steps[index] == self.depth:
            self._widen(index)

    def open(self) -> None:
        for index in self.starts:
            self.steps[index] = 1
            for part in self.narrow:
                part[index] = T.broadcast(T.int16(0), 2 * self.lanes)

    def close(self) -> None:
        for index in [index for index, steps in self.steps.items() if steps]:
            self._widen(index)

    def _widen(self, index: int) -> None:
        self.sums[index] = self.sums[index] + self._wide(index)
        self.steps[index] = 0

    def _products(self, slot: int, word: Expr) -> list[Expr]:
        raise NotImplementedError

    def _wide(self, index: int) -> Expr:
        raise NotImplementedError


class Maddubs(Narrow):
    """SSSE3 and AVX2, codes below 8 bits: pairs of unsigned x signed products. 8 steps of 2 * 15 * 127 stay below 2^15,
    and 2 of 2 * 63 * 127. Longer codes are widened every 2 steps, which any loop over chunks is a multiple of."""

    unrolled = False  # one long block would be scheduled sum by sum, and the weights spilled

    def __init__(self, isa: Isa, sums: int, weights: int, depth: int) -> None:
        super().__init__(isa, sums, weights, depth, 1)

    def _products(self, slot: int, word: Expr) -> list[Expr]:
        return [maddubs(self.lanes, self.weights[slot], self._word(word))]

    def _wide(self, index: int) -> Expr:
        return widen_pairs(self.lanes, self.narrow[0][index])


class SignedMaddubs(Dots):
    """SSSE3 and AVX2, int8: |w| times x with the sign of w. A pair is at most 2 * 128 * 127, below 2^15."""

    unrolled = False

    def __init__(self, isa: Isa, sums: int, weights: int) -> None:
        super().__init__(isa, sums, weights)
        self.magnitudes = Registers("uint8", 4 * isa.lanes, weights)

    def weigh(self, slot: int, codes: Expr) -> None:
        super().weigh(slot, codes)
        lanes = 4 * self.lanes
        magnitude = T.call_llvm_pure_intrin(f"int8x{lanes}", "llvm.abs", self._signed(slot), T.bool(False))
        self.magnitudes[slot] = T.reinterpret(f"uint8x{lanes}", magnitude)

    def add(self, index: int, slot: int, word: Expr) -> None:
        name = "llvm.x86.avx2.psign.b" if self.lanes == 8 else "llvm.x86.ssse3.psign.b.128"
        signed = intrinsic(f"int8x{4 * self.lanes}", name, self._word(word), self._signed(slot))
        products = maddubs(self.lanes, self.magnitudes[slot], signed)
        self.sums[index] = self.sums[index] + widen_pairs(self.lanes, products)


class Smull(Narrow):
    """Plain NEON: widening products, eight at a time. `depth` products of a lane stay below 2^15."""

    def __init__(self, isa: Isa, sums: int, weights: int, depth: int) -> None:
        super().__init__(isa, sums, weights, depth, 2)

    def _products(self, slot: int, word: Expr) -> list[Expr]:
        halves = (load(self.weights.buffer, slot * 16 + offset, 8) for offset in (0, 8))
        name = "llvm.aarch64.neon.smull.v8i16"
        return [intrinsic("int16x8", name, T.reinterpret("int8x8", half), self._word(word, 2)) for half in halves]

    def _wide(self, index: int) -> Expr:
        pairs = [intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", part[index]) for part in self.narrow]
        return intrinsic("int32x4", "llvm.aarch64.neon.addp.v4i32", *pairs)


def maddubs(lanes: int, unsigned: Expr, signed: Expr) -> Expr:
    """int16 x 2 * lanes: sums of pairs of products of bytes."""
    name = "llvm.x86.avx2.pmadd.ub.sw" if lanes == 8 else "llvm.x86.ssse3.pmadd.ub.sw.128"
    return intrinsic(f"int16x{2 * lanes}", name, unsigned, signed)


def widen_pairs(lanes: int, products: Expr) -> Expr:
    """int32 x lanes: sums of pairs of 16-bit values."""
    name = "llvm.x86.avx2.pmadd.wd" if lanes == 8 else "llvm.x86.sse2.pmadd.wd"
    return intrinsic(f"int32x{lanes}", name, products, T.broadcast(T.int16(1), 2 * lanes))


def unpacked(bits: int, stored: list[Expr], lanes: int, step: int) -> Expr:
    """Columns 4 * step .. 4 * step + 3 of a chunk out of its stored vectors (packing_int.py): uint8 x 4 * lanes."""
    if bits == 8:
        return stored[0]
    words = [T.reinterpret(f"int32x{lanes}", vector) for vector in stored]
    nibbles = words[0] if bits == 4 else words[1 + step // 2]
    codes = T.bitwise_and(_shifted(nibbles, 4 * (step % 2), lanes), int_vector(0x0F0F0F0F, lanes))
    if bits == 6:  # two upper bits: of columns 0..3 in bits 0 and 1 of a byte, of columns 4..7 in bits 2 and 3, ...
        upper = T.bitwise_and(_shifted(words[0], 2 * step - 4, lanes), int_vector(0x30303030, lanes))
        codes = T.bitwise_or(codes, upper)
    return T.reinterpret(f"uint8x{4 * lanes}", codes)


def _shifted(words: Expr, right: int, lanes: int) -> Expr:
    """Shifted right by that many bits, left if it is negative. Bits that cross into other bytes are masked behind."""
    if right == 0:
        return words
    shift = T.shift_right if right > 0 else T.shift_left
    return shift(words, int_vector(abs(right), lanes))
