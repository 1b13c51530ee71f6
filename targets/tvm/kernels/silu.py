"""The gate's activation, x * sigmoid(x)."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.ir import Expr, Registers, float_vector
from targets.tvm.kernels.vector import LOG2_E, Vectors

# 2^126 is the last power of two before overflow; silu of what lies beyond is zero to float32.
LIMIT = 126.0


def silu(vectors: Vectors, x: Expr, work: Registers) -> Expr:
    """x / (1 + 2^(-x log2 e)) as one vector; `x` is read twice (a register), `work[0]` is used up."""
    lanes = vectors.lanes
    exponent = x * float_vector(-LOG2_E, lanes)
    work[0] = T.max(T.min(exponent, float_vector(LIMIT, lanes)), float_vector(-LIMIT, lanes))
    return x / (float_vector(1.0, lanes) + vectors.exp2(work[0]))
