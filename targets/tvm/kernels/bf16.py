"""bfloat16 products and what goes with them, on AVX-512 BF16.

TVM hands bfloat16 vectors to LLVM as float32. So pairs travel as int32 words, two bfloat16 in each, and small LLVM
functions, which LLVM takes into the kernel, unpack them at the instruction.
"""

from contextlib import AbstractContextManager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.ir import Expr, float_vector, intrinsic
from targets.tvm.kernels.vector import Vectors

# 2^f on [-1/2, 1/2], relative error below 8e-5; rounding to bfloat16 costs up to 4e-3 (minimax).
EXP2_COARSE = (0.99992807356, 0.69326098595, 0.24261112199, 0.055171666414)

_JOIN = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
_LLVM = f"""
declare <32 x bfloat> @{_JOIN}(<16 x float>, <16 x float>)
declare <16 x float> @{_DOT}(<16 x float>, <32 x bfloat>, <32 x bfloat>)

define <16 x float> @bf16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b) {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %result = call <16 x float> @{_DOT}(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %result
}}

define <16 x i32> @bf16_join(<16 x float> %low, <16 x float> %high) {{
  %joined = call <32 x bfloat> @{_JOIN}(<16 x float> %high, <16 x float> %low)
  %result = bitcast <32 x bfloat> %joined to <16 x i32>
  ret <16 x i32> %result
}}

define <16 x i32> @bf16_pair(<16 x float> %low, <16 x float> %high) {{
  %joined = call <32 x bfloat> @{_JOIN}(<16 x float> %high, <16 x float> %low)
  %pairs = shufflevector <32 x bfloat> %joined, <32 x bfloat> poison, <32 x i32> <
    {", ".join(f"i32 {half + lane}" for lane in range(16) for half in (0, 16))}>
  %result = bitcast <32 x bfloat> %pairs to <16 x i32>
  ret <16 x i32> %result
}}
"""


def bf16_functions() -> AbstractContextManager[Any]:
    """What stands in this block may call `dot`, `join` and `pair`."""
    block: AbstractContextManager[Any] = T.attr(T.int32(0), "pragma_import_llvm", _LLVM)
    return block


def dot(total: Expr, pairs: Expr, others: Expr) -> Expr:
    """float32x16 `total` plus the two products of each lane of two int32x16 that hold pairs."""
    return tirx.call_pure_extern("float32x16", "bf16_dot", total, pairs, others)


def join(low: Expr, high: Expr) -> Expr:
    """32 values, those of `low` first, rounded to nearest, ties to even: int32x16, neighbours in pairs."""
    return tirx.call_pure_extern("int32x16", "bf16_join", low, high)


def pair(low: Expr, high: Expr) -> Expr:
    """Lane for lane a pair of one value of `low` and one of `high`: int32x16."""
    return tirx.call_pure_extern("int32x16", "bf16_pair", low, high)


def exp2_coarse(vectors: Vectors, x: Expr) -> Expr:
    """2^x of float32x16 for any x of at most 127, to be rounded to bfloat16; far below -126 it is 0. Name `x`."""
    whole = T.bind(vectors.rint(x))
    rest = T.bind(x - whole)
    value = float_vector(EXP2_COARSE[-1], vectors.lanes)
    for coefficient in reversed(EXP2_COARSE[:-1]):
        value = vectors.fma(value, rest, float_vector(coefficient, vectors.lanes))
    value = T.bind(value)
    name, every_lane, current_rounding = "llvm.x86.avx512.mask.scalef.ps.512", T.uint16(0xFFFF), T.int32(4)
    return intrinsic(vectors.float, name, value, whole, value, every_lane, current_rounding)
