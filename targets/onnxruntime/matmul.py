"""Matrix products and embeddings: MatMulNBits, FusedMatMul, GatherBlockQuantized."""

from dataclasses import replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.lowering import Matrix, SliceLowering
from targets.onnxruntime.weight_file import QuantizedMatrix

# Activations are quantized to int8 block by block, so that the VNNI kernels run (MatMulNBits, accuracy_level).
INT8_ACTIVATIONS = 4


def matmul(low: SliceLowering, x: ir.Value, matrix: Matrix, bias: ir.Value | None) -> ir.Value:
    """x [.., K] times a weight [N, K], or some of its rows, transposed, plus bias [N]."""
    if not isinstance(matrix.weight, CheckpointWeight) or matrix.part or not matrix.transposed:
        raise low.refuse(f"MatMul with {matrix.name} that is not a transposed weight matrix")
    name = matrix.name.removesuffix(".weight")
    if matrix.weight.precision.is_integer:
        return _matmul_n_bits(low, x, matrix, name, bias)
    weight = low.weight_tensor(replace(matrix, transposed=False))
    product = low.graph.op(
        "FusedMatMul", [x, weight], name, domain=MICROSOFT, attributes={"transA": 0, "transB": 1, "alpha": 1.0}
    )
    return product if bias is None else low.graph.op("Add", [product, bias], f"{name}.bias_add")


def _matmul_n_bits(low: SliceLowering, x: ir.Value, matrix: Matrix, name: str, bias: ir.Value | None) -> ir.Value:
    assert isinstance(matrix.weight, CheckpointWeight)
    stored = low.weights.quantized(matrix.name, matrix.weight)
    if matrix.rows is not None:
        stored = stored.select(matrix.name, matrix.rows)
    rows, width = stored.shape
    inputs: list[ir.Value | None] = [x, *_operands(low, stored, blocked=True)]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    attributes: dict[str, int | float | str] = {
        "K": width,
        "N": rows,
        "bits": stored.bits,
        "block_size": stored.group_size,
        "accuracy_level": INT8_ACTIVATIONS,
    }
    return low.graph.op("MatMulNBits", inputs, name, domain=MICROSOFT, attributes={**attributes})


def gather(low: SliceLowering, matrix: Matrix, indices: ir.Value) -> ir.Value:
    """Rows of an embedding table [V, H] for indices [B, S] -> [B, S, H] float."""
    if not isinstance(matrix.weight, CheckpointWeight) or matrix.part or matrix.transposed:
        raise low.refuse(f"Gather from {matrix.name} that is not a plain table")
    name = matrix.name.removesuffix(".weight")
    if not matrix.weight.precision.is_integer:
        table = low.graph.initializer(low.weights.floats(matrix.name, matrix.weight))
        rows = low.graph.op("Gather", [table, indices], name, attributes={"axis": 0})
        if matrix.weight.precision.kind == "fp32":
            return rows
        return low.graph.op("Cast", [rows], f"{name}.cast", attributes={"to": int(ir.DataType.FLOAT)})
    stored = low.weights.quantized(matrix.name, matrix.weight)
    codes, *parameters = _operands(low, stored, blocked=False)
    return low.graph.op(
        "GatherBlockQuantized",
        [codes, indices, *parameters],
        name,
        domain=MICROSOFT,
        attributes={"gather_axis": 0, "quantize_axis": 1, "block_size": stored.group_size, "bits": stored.bits},
    )


def _operands(low: SliceLowering, stored: QuantizedMatrix, blocked: bool) -> list[ir.Value]:
    """Codes, scales and zero points as initializers. Codes are [N, groups, bytes] for MatMulNBits (`blocked`) and
    [N, bytes] for GatherBlockQuantized: two views of the same bytes when a tied head shares its table."""
    rows = stored.shape[0]
    shape = (rows, stored.groups, stored.group_bytes) if blocked else (rows, stored.groups * stored.group_bytes)
    suffix = "codes" if blocked else "rows"
    tensors = [
        low.weights.tensor(f"{stored.name}.{suffix}", stored.codes, ir.DataType.UINT8, shape),
        low.weights.tensor(f"{stored.name}.scales", stored.scales, ir.DataType.FLOAT, (rows, stored.groups)),
    ]
    if stored.zero_points is not None:
        packed = (rows, stored.zero_point_bytes)
        tensors.append(low.weights.tensor(f"{stored.name}.zero_points", stored.zero_points, ir.DataType.UINT8, packed))
    return [low.graph.initializer(tensor) for tensor in tensors]
