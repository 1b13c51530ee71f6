"""The scales of packed weights as float32 vectors: those of a record's rows, and the factors at the end of a block."""

from tvm.script.ir_builder import tirx as T

from targets.tvm.kernels.ir import Expr, load
from targets.tvm.kernels.vector import Vectors
from targets.tvm.packing import Layout


def record_scales(vectors: Vectors, packed: Layout, weights: Expr, record: Expr, vector: Expr) -> Expr:
    """The scales of one vector of rows (0 or 1) of the record that starts at byte `record`."""
    at = record + packed.scales_at + packed.scale_bytes * vectors.lanes * vector
    if packed.kind == "mxfp4":
        return vectors.power_from_bytes(weights, at)
    return (vectors.e4m3_from_bytes if packed.kind == "nvfp4" else vectors.half_from_bytes)(weights, at)


def block_factors(vectors: Vectors, packed: Layout, weights: Expr, block: Expr, vector: int) -> Expr:
    """The factors of one vector of rows of a block."""
    at = block * packed.block_bytes + packed.factors_at + 4 * vectors.lanes * vector
    return vectors.floats_from_bytes(weights, at)


def row_factor(packed: Layout, weights: Expr, row: Expr) -> Expr:
    """The factor of one row of the matrix, a scalar; 1 where rows have none."""
    if not packed.row_scaled:
        return T.float32(1)
    at = row // packed.step * packed.block_bytes + packed.factors_at + row % packed.step * 4
    return T.bind(T.reinterpret("float32", load(weights, at, 4)))
