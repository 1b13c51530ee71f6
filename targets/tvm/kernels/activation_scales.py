"""The scale that turns a group of a token's activations into int8 codes, and what matrix products read of it.

`GroupScales`: scale = max|x| / 127 of the group, float32.
`SharedExponents`: scale = base * 2^e, base = max|x| / 127 of the whole row, e = ceil(log2(max|x of the group| / max|x|
of the row)), from -24 to 0. Products read (e + 32) << 23, which is added to the bits of a weight scale, and multiply
what they have summed by base * 2^-32.
`TokenScales`: scale = base for every group; products read it as they read the second, with e = 0.
"""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from targets.base import ActivationRounding
from targets.tvm.kernels.ir import Expr, Registers, float_vector, store
from targets.tvm.kernels.vector import Vectors

LARGEST = 127
LEAST_EXPONENT, OFFSET = -24, 32
# A row below this is one of zeros: base * 2^-32 and its inverse stay normal numbers.
LEAST_ROW = 2.0**-80
CHAINS = 4

Load = Callable[[Expr], Expr]
"""column -> the vector of `lanes` values that begins there."""


class GroupScales:
    """One float32 scale a group."""

    def __init__(self, scales: Expr) -> None:
        self.scales = scales

    def row(self, row: Expr, largest: Callable[[], Expr]) -> None:
        """Called once a row, before its groups; `largest` emits max|x| of the row."""

    def group(self, target: Expr, largest: Callable[[], Expr]) -> Expr:
        """Store at `target` what a group is read with; `largest` emits its max|x|. 1 / scale, zero where that is."""
        scale = T.bind(largest() / T.float32(LARGEST))
        store(self.scales, target, scale, 1)
        return T.bind(T.Select(scale > T.float32(0), T.float32(1) / scale, T.float32(0)))


class SharedExponents:
    """One float32 base a row, one shift a group.

    No code passes 127: the group's largest value is at most 2^e * the row's but for the rounding of two quotients, and
    127 * (1 + 2^-21) rounds to 127.
    """

    def __init__(self, shifts: Expr, bases: Expr) -> None:
        self.shifts, self.bases = shifts, bases

    def row(self, row: Expr, largest: Callable[[], Expr]) -> None:
        """Called once a row, before its groups; `largest` emits max|x| of the row."""
        top = largest()
        zero = T.bind(top < T.float32(LEAST_ROW))
        base = T.bind(top / T.float32(LARGEST))
        store(self.bases, row, T.Select(zero, T.float32(0), base * T.float32(2.0**-OFFSET)), 1)
        self.inverse_top = T.bind(T.Select(zero, T.float32(0), T.float32(1) / top))
        self.inverse_base = T.bind(T.Select(zero, T.float32(0), T.float32(1) / base))

    def group(self, target: Expr, largest: Callable[[], Expr]) -> Expr:
        """Store at `target` what a group is read with; `largest` emits its max|x|. 1 / scale, zero where that is."""
        ratio = T.bind(T.reinterpret("int32", largest() * self.inverse_top))
        # Adding all but the last unit of the fraction carries into the exponent unless the ratio is a power of two.
        exponent = T.shift_right(ratio + T.int32(0x7FFFFF), T.int32(23)) - T.int32(127)
        exponent = T.bind(T.max(T.min(exponent, T.int32(0)), T.int32(LEAST_EXPONENT)))
        store(self.shifts, target, T.shift_left(exponent + T.int32(OFFSET), T.int32(23)), 1)
        power = T.reinterpret("float32", T.shift_left(T.int32(127) - exponent, T.int32(23)))
        return T.bind(self.inverse_base * power)


class TokenScales(SharedExponents):
    """One float32 base a row, which is the scale of every group."""

    def group(self, target: Expr, largest: Callable[[], Expr]) -> Expr:
        """Store at `target` what a group is read with; `largest` emits its max|x|. 1 / scale, zero where that is."""
        store(self.shifts, target, T.int32(OFFSET << 23), 1)
        return self.inverse_base


Scales = GroupScales | SharedExponents


def scales_of(rounding: ActivationRounding, scales: Expr, bases: Expr) -> Scales:
    """What a rounding stores in the tensors of scales (or shifts) and bases."""
    if rounding == "group":
        return GroupScales(scales)
    return (TokenScales if rounding == "token" else SharedExponents)(scales, bases)


def largest_in_row(vectors: Vectors, values: Load, width: int) -> Expr:
    """max|x| of `width` values, a multiple of the lanes; a scalar."""
    lanes = vectors.lanes
    count = width // lanes
    chains = next(chains for chains in (CHAINS, 3, 2, 1) if count % chains == 0)
    largest = Registers("float32", lanes, chains)
    for chain in range(chains):
        largest[chain] = float_vector(0.0, lanes)
    with T.serial(0, count // chains) as block:
        for chain in range(chains):
            size = vectors.abs(values((block * chains + chain) * lanes))
            largest[chain] = T.max(largest[chain], size)
    for chain in range(1, chains):
        largest[0] = T.max(largest[0], largest[chain])
    return T.bind(largest.reduce(0, T.max))


def scaled(vectors: Vectors, stored: Expr, weight_scale: Expr, exponents: bool) -> Expr:
    """Weight scales (float32 vector) times what `group` stored for a group, a scalar.

    With exponents their sum cannot overflow: a float16 is 0 or from 2^-24 to below 2^16, the shift is from 2^8 to 2^32.
    A weight scale of 0 becomes at most 2^-95, and codes of 0 make nothing of it.
    """
    if not exponents:
        return weight_scale * T.broadcast(stored, vectors.lanes)
    bits = T.reinterpret(vectors.int, weight_scale) + T.broadcast(stored, vectors.lanes)
    return T.reinterpret(vectors.float, bits)
