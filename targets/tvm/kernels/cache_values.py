"""Cached values as vectors: widened to float32 when they are read, rounded when they are written."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.cache_format import CacheKind
from targets.tvm.kernels.ir import Expr, float_vector, int_vector, load
from targets.tvm.kernels.vector import Vectors


def read_cached(vectors: Vectors, kind: CacheKind, cache: Expr, first: Expr) -> Expr:
    """`lanes` consecutive values of a cache as float32; codes of int8 are not scaled yet."""
    if kind.name == "fp16":
        return vectors.load_half(cache, first)
    values = load(cache, first, vectors.lanes)
    return values if kind.name == "fp32" else T.cast(values, vectors.float)


def to_half(vectors: Vectors, x: Expr) -> Expr:
    """float16 of a float32 vector, to nearest, ties to even; too large becomes infinite. Name `x` a register."""
    half = f"float16x{vectors.lanes}"
    return T.cast(x, half) if vectors.isa.half else T.reinterpret(half, _half_bits(vectors, x))


def to_code(vectors: Vectors, x: Expr, divisor: Expr) -> Expr:
    """int8 codes of a float32 vector: rint(x / divisor)."""
    return T.cast(T.cast(vectors.rint(x / divisor), vectors.int), f"int8x{vectors.lanes}")


def _half_bits(vectors: Vectors, x: Expr) -> Expr:
    """float16 bits with integer instructions. Below 2^-14 an addition aligns the bits and rounds them, above it
    rounding is done on the bits themselves and the carry may enter the exponent."""

    def whole(value: int) -> Expr:
        return int_vector(value, vectors.lanes)

    def bits(value: Expr) -> Expr:
        return T.reinterpret(vectors.int, value)

    subnormal_bias = 126 << 23  # 0.5: its last bit is 2^-24, that of a subnormal float16
    sign = T.bind(T.bitwise_and(T.shift_right(bits(x), whole(16)), whole(0x8000)))
    magnitude = T.bind(T.bitwise_and(bits(x), whole(0x7FFFFFFF)))
    small = bits(T.reinterpret(vectors.float, magnitude) + float_vector(0.5, vectors.lanes)) - whole(subnormal_bias)
    odd = T.bitwise_and(T.shift_right(magnitude, whole(13)), whole(1))
    normal = T.shift_right(magnitude + odd + whole(0xFFF - (112 << 23)), whole(13))
    not_finite = T.Select(magnitude > whole(255 << 23), whole(0x7E00), whole(0x7C00))
    rounded = T.Select(magnitude < whole(113 << 23), small, normal)
    result = T.Select(magnitude < whole(143 << 23), rounded, not_finite)
    return T.cast(T.bitwise_or(result, sign), f"uint16x{vectors.lanes}")
