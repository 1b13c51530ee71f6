"""Float products with decoded matrices whose rows do not depend, to the last bit, on how many there are.

ONNX Runtime (MLAS sgemm) adds one row in another order than several. Nor is the order of several one: it cuts K into
pieces of 128 to 1024, fewer the narrower the part of N that a thread gets, and how it shares N depends on the number of
rows and of threads. Where the next matrix takes activations rounded to E4M3, a last bit becomes an eighth of a value.

So the matrix is a batch of matrices of at most 16 rows: the least that MLAS gives to a thread, which it therefore never
divides. And a lone row gets a row of zeros beside it (even_rows.py).
"""

import math

import onnx_ir as ir

from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.lowering import SliceLowering

UNDIVIDED = 16
"""MLAS_SGEMM_STRIDEN_THREAD_ALIGN: columns of a product that stay with one thread."""


def steady_product(low: SliceLowering, x: ir.Value, weight: ir.Value, shape: tuple[int, int], name: str) -> ir.Value:
    """x [.., K] times a float matrix `weight` of `shape` [N, K], transposed -> [.., N]."""
    rows, width = shape
    together = math.gcd(rows, UNDIVIDED)
    op, constant = low.graph.op, low.graph.constant
    parts = op("Reshape", [weight, constant([rows // together, together, width])], f"{name}.parts")

    def product(x: ir.Value) -> ir.Value:
        """[R, K] -> [R, N], by way of [N / together, R, together]."""
        attributes: dict[str, int | float | str] = {"transA": 0, "transB": 1, "alpha": 1.0}
        found = op("FusedMatMul", [x, parts], name, domain=MICROSOFT, attributes={**attributes})
        beside = op("Transpose", [found], f"{name}.beside", attributes={"perm": [1, 0, 2]})
        return op("Reshape", [beside, constant([0, rows])], f"{name}.joined")

    return low.rows.multiply(x, name, product)
