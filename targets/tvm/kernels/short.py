"""Products of 16-bit integers, two in each 32-bit lane, summed in 32 bits, on VNNI."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.ir import Expr, float_vector, int_vector, intrinsic
from targets.tvm.kernels.vector import Vectors

TINY = 1e-30
"""Stands for a norm of zero."""
_ROUNDING = 1.5 * 2.0**23
"""A float32 below 2^22 has, with this added, its rounded value in the low bits, as an integer."""


def add_pairs(vectors: Vectors, total: Expr, words: Expr, others: Expr) -> Expr:
    """int32 `total` plus the two products of each lane."""
    pairs = f"int16x{2 * vectors.lanes}"
    name = f"llvm.x86.avx512.vpdpwssd.{32 * vectors.lanes}"
    return intrinsic(vectors.int, name, total, T.reinterpret(pairs, words), T.reinterpret(pairs, others))


def rounded(vectors: Vectors, values: Expr, factor: Expr) -> Expr:
    """int32 lanes whose low half is rint(values * factor) as a 16-bit integer."""
    return T.reinterpret(vectors.int, vectors.fma(values, factor, float_vector(_ROUNDING, vectors.lanes)))


def neighbours(vectors: Vectors, values: Expr, factor: Expr) -> Expr:
    """rint(values * factor), neighbouring lanes in one word: int32, half as many lanes."""
    codes = T.cast(rounded(vectors, values, factor), f"int16x{vectors.lanes}")
    return T.reinterpret(f"int32x{vectors.lanes // 2}", codes)


def pair(vectors: Vectors, low: Expr, high: Expr) -> Expr:
    """Words of the low halves of two int32 vectors, lane for lane."""
    lower = T.bitwise_and(low, int_vector(0xFFFF, vectors.lanes))
    return T.bitwise_or(lower, T.shift_left(high, int_vector(16, vectors.lanes)))
