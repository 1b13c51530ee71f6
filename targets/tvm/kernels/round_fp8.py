"""Activations rounded to FP8 E4M3 (OCP 8-bit Floating Point Specification 1.0), with a scale max|x| / 448 a row."""

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, float_vector, int_vector, kernel, load, size
from targets.tvm.kernels.norm import few_or_many
from targets.tvm.kernels.partial import load_part, store_part
from targets.tvm.kernels.vector import Vectors

LARGEST = 448.0
LEAST_SCALE = 2.0**-126
FRACTION_BITS = 20
"""Bits of a float32 fraction that E4M3 lacks."""
LEAST_NORMAL = 2.0**-6
SUBNORMALS = 2.0**-9
"""What is below is rounded to multiples of this."""


def round_fp8(isa: Isa, name: str, width: int) -> tirx.PrimFunc:
    """x float32 [M, K] -> y float32 [M, K]: E4M3(x / scale) * scale, halves to even; rows of zeros stay zero."""
    with kernel(name) as finished:
        rows = size("m")
        x, y = arguments(x=((rows, width), "float32"), y=((rows, width), "float32"))
        vectors = Vectors(isa)

        def one_row(row: Expr) -> None:
            start = T.bind(row * width)
            scale = T.bind(T.max(_largest(vectors, x, start, width) / T.float32(LARGEST), T.float32(LEAST_SCALE)))
            inverse = T.bind(T.float32(1) / scale)
            edge = Registers("float32", isa.lanes, 2)

            def rounded(offset: Expr, count: int) -> None:
                values = load_part(x, start + offset, count, edge, 0) * broadcast(inverse, isa.lanes)
                codes = nearest_e4m3(vectors, values)
                store_part(y, start + offset, codes * broadcast(scale, isa.lanes), count, edge, 1)

            with T.serial(0, width // isa.lanes) as block:
                rounded(block * isa.lanes, isa.lanes)
            if width % isa.lanes:
                rounded(width - width % isa.lanes, width % isa.lanes)

        few_or_many(rows, one_row)
    return finished()


def nearest_e4m3(vectors: Vectors, values: Expr) -> Expr:
    """The nearest E4M3 numbers of float32 values below 464 in magnitude, halves to even."""
    lanes = vectors.lanes
    held = Registers("float32", lanes, 1)
    held[0] = values
    bits = T.reinterpret(vectors.int, held[0])
    odd = T.bitwise_and(T.shift_right(bits, int_vector(FRACTION_BITS, lanes)), int_vector(1, lanes))
    rounded = bits + odd + int_vector((1 << (FRACTION_BITS - 1)) - 1, lanes)
    normal = T.reinterpret(vectors.float, T.bitwise_and(rounded, int_vector(-1 << FRACTION_BITS, lanes)))
    small = vectors.rint(held[0] * float_vector(1 / SUBNORMALS, lanes)) * float_vector(SUBNORMALS, lanes)
    return T.Select(vectors.abs(held[0]) < float_vector(LEAST_NORMAL, lanes), small, normal)


def _largest(vectors: Vectors, x: Expr, start: Expr, width: int) -> Expr:
    """max|x| of a row, a scalar."""
    lanes = vectors.lanes
    largest, edge = Registers("float32", lanes, 1), Registers("float32", lanes, 1)
    largest[0] = float_vector(0.0, lanes)
    with T.serial(0, width // lanes) as block:
        largest[0] = T.max(largest[0], vectors.abs(load(x, start + block * lanes, lanes)))
    if width % lanes:
        rest = load_part(x, start + (width - width % lanes), width % lanes, edge, 0)
        largest[0] = T.max(largest[0], vectors.abs(rest))
    return T.bind(largest.reduce(0, T.max))
