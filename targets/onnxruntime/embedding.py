"""Rows of the embedding table: Gather, GatherBlockQuantized, and for nf4 the steps that look levels up."""

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from exporter.core.number_formats import decode_table
from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.lowering import SliceLowering
from targets.onnxruntime.matmul import parameters
from targets.onnxruntime.weight_file import QuantizedMatrix
from targets.slice_weights import Matrix

FLOAT, INT32, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8
# GatherBlockQuantized: the whole of a row is one block.
WHOLE_ROW = 0


def gather(low: SliceLowering, matrix: Matrix, indices: ir.Value) -> ir.Value:
    """Rows of an embedding table [V, H] for indices [B, S] -> [B, S, H] float."""
    if not isinstance(matrix.weight, CheckpointWeight) or matrix.part or matrix.transposed:
        raise low.refuse(f"Gather from {matrix.name} that is not a plain table")
    name, kind = matrix.name.removesuffix(".weight"), matrix.weight.precision.kind
    if not matrix.weight.precision.is_coded:
        return _gather_floats(low, matrix, matrix.weight, indices, name)
    stored = low.weights.quantized(matrix.name, matrix.weight)
    if kind == "nf4":
        return _gather_levels(low, stored, indices, name, decode_table(kind))
    return _gather_blocks(low, stored, indices, name, fp8=kind == "fp8")


def _gather_floats(
    low: SliceLowering, matrix: Matrix, weight: CheckpointWeight, indices: ir.Value, name: str
) -> ir.Value:
    table = low.graph.initializer(low.weights.floats(matrix.name, weight))
    rows = low.graph.op("Gather", [table, indices], name, attributes={"axis": 0})
    if weight.precision.kind == "fp32":
        return rows
    return low.graph.op("Cast", [rows], f"{name}.cast", attributes={"to": int(FLOAT)})


def _gather_blocks(low: SliceLowering, stored: QuantizedMatrix, indices: ir.Value, name: str, *, fp8: bool) -> ir.Value:
    """The codes are [V, bytes] here and in blocks for MatMulNBits: two views of the same bytes where a tied head
    shares its table."""
    shape = (stored.shape[0], stored.groups * stored.group_bytes)
    dtype, suffix = (ir.DataType.FLOAT8E4M3FN, "codes") if fp8 else (UINT8, "rows")
    codes = low.graph.initializer(low.weights.codes(stored, suffix, shape, dtype))
    attributes: dict[str, int | float | str] = {
        "gather_axis": 0,
        "quantize_axis": 1,
        "block_size": WHOLE_ROW if fp8 else stored.group_size,
        "bits": stored.bits,
    }
    inputs = [codes, indices, *parameters(low, stored)]
    return low.graph.op("GatherBlockQuantized", inputs, name, domain=MICROSOFT, attributes={**attributes})


def _gather_levels(
    low: SliceLowering, stored: QuantizedMatrix, indices: ir.Value, name: str, levels: np.ndarray
) -> ir.Value:
    """Codes of two a byte, the earlier one in the high nibble, as MatMulBnb4 has them: taken apart, looked up among
    the levels and multiplied by the scales of their groups."""
    op, graph, rows = low.graph.op, low.graph, stored.shape[0]
    packed = graph.initializer(low.weights.codes(stored, "rows", (rows, stored.shape[1] // 2)))
    scales = graph.initializer(low.weights.scales(stored, (rows, stored.groups)))
    table = graph.initializer(ir.tensor(levels, name="levels.nf4"))
    bytes_ = op("Gather", [packed, indices], f"{name}.bytes", attributes={"axis": 0})
    halves = [
        op("BitShift", [bytes_, graph.constant([4], UINT8)], f"{name}.high", attributes={"direction": "RIGHT"}),
        op("BitwiseAnd", [bytes_, graph.constant([15], UINT8)], f"{name}.low"),
    ]
    last = graph.constant([-1])
    pairs = [op("Unsqueeze", [half, last], f"{name}.nibble") for half in halves]
    codes = op("Concat", pairs, f"{name}.codes", attributes={"axis": -1})
    numbers = op("Cast", [codes], f"{name}.indices", attributes={"to": int(INT32)})
    values = op("Gather", [table, numbers], f"{name}.levels", attributes={"axis": 0})
    # [B, S, H / 2, 2] -> [B, S, groups, group]
    grouped = op("Reshape", [values, graph.constant([0, 0, -1, stored.group_size])], f"{name}.groups")
    factors = op("Gather", [scales, indices], f"{name}.scales", attributes={"axis": 0})
    product = op("Mul", [grouped, op("Unsqueeze", [factors, last], f"{name}.factors")], f"{name}.scaled")
    return op("Reshape", [product, graph.constant([0, 0, -1])], name)
