"""Matrix products: MatMulNBits for integers, MatMulBnb4 for nf4, FusedMatMul for floats and fp8."""

from dataclasses import replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import Precision
from targets.onnxruntime.engine_graph import MICROSOFT
from targets.onnxruntime.even_rows import needs_even_rows
from targets.onnxruntime.lowering import SliceLowering
from targets.onnxruntime.steady_sums import steady_product
from targets.onnxruntime.stored_rows import in_blocks
from targets.onnxruntime.weight_file import QuantizedMatrix
from targets.slice_weights import Matrix

# Activations are quantized to int8 block by block, so that the VNNI kernels run (MatMulNBits, accuracy_level).
INT8_ACTIVATIONS = 4
NF4 = 1
# 64 MB of float32; a head of 128k rows would take 1 GB and more in one piece.
MOST_DECODED = 1 << 24
# Parts whose codes start on pages are mapped, not read.
ROWS_TOGETHER = 64


def matmul(low: SliceLowering, x: ir.Value, matrix: Matrix, bias: ir.Value | None) -> ir.Value:
    """x [.., K] times a weight [N, K], or some of its rows, transposed, plus bias [N]."""
    if not isinstance(matrix.weight, CheckpointWeight) or matrix.part or not matrix.transposed:
        raise low.refuse(f"MatMul with {matrix.name} that is not a transposed weight matrix")
    name, precision = matrix.name.removesuffix(".weight"), matrix.weight.precision
    if in_blocks(precision):
        return _matmul_n_bits(low, x, _stored(low, matrix), name, bias)
    if precision.is_coded:
        product = _matmul_decoded(low, x, _stored(low, matrix), name, precision)
    else:
        product = _matmul_floats(low, x, low.weight_tensor(replace(matrix, transposed=False)), name)
    return product if bias is None else low.graph.op("Add", [product, bias], f"{name}.bias_add")


def _matmul_floats(low: SliceLowering, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    attributes: dict[str, int | float | str] = {"transA": 0, "transB": 1, "alpha": 1.0}
    return low.graph.op("FusedMatMul", [x, weight], name, domain=MICROSOFT, attributes={**attributes})


def _matmul_decoded(
    low: SliceLowering, x: ir.Value, stored: QuantizedMatrix, name: str, precision: Precision
) -> ir.Value:
    """Products with a matrix that is decoded to float32 each time: in parts where it is large."""
    parts = _decoded_parts(stored)
    names = [name if len(parts) == 1 else f"{name}.{index}" for index in range(len(parts))]
    multiply = _matmul_bnb4 if precision.kind == "nf4" else _matmul_rounded if precision.activations else _matmul_fp8
    products = [multiply(low, x, part, each) for part, each in zip(parts, names, strict=True)]
    return products[0] if len(parts) == 1 else low.graph.op("Concat", products, name, attributes={"axis": -1})


def _matmul_fp8(low: SliceLowering, x: ir.Value, stored: QuantizedMatrix, name: str) -> ir.Value:
    return _matmul_floats(low, x, _fp8(low, stored), name)


def _matmul_rounded(low: SliceLowering, x: ir.Value, stored: QuantizedMatrix, name: str) -> ir.Value:
    """Where activations are rounded to E4M3, here and behind."""
    return steady_product(low, x, _fp8(low, stored), stored.shape, name)


def _decoded_parts(stored: QuantizedMatrix) -> list[QuantizedMatrix]:
    """Some of its rows each, few enough that decoding them takes at most MOST_DECODED weights."""
    rows, width = stored.shape
    if rows * width <= MOST_DECODED:
        return [stored]
    step = max(MOST_DECODED // width // ROWS_TOGETHER, 1) * ROWS_TOGETHER
    starts = range(0, rows, step)
    return [stored.select(f"{stored.name}.{start // step}", (start, min(start + step, rows))) for start in starts]


def _stored(low: SliceLowering, matrix: Matrix) -> QuantizedMatrix:
    assert isinstance(matrix.weight, CheckpointWeight)
    stored = low.weights.quantized(matrix.name, matrix.weight)
    return stored if matrix.rows is None else stored.select(matrix.name, matrix.rows)


def _matmul_n_bits(
    low: SliceLowering, x: ir.Value, stored: QuantizedMatrix, name: str, bias: ir.Value | None
) -> ir.Value:
    rows, width = stored.shape
    codes = low.weights.codes(stored, "codes", (rows, stored.groups, stored.group_bytes))
    inputs: list[ir.Value | None] = [low.graph.initializer(codes), *parameters(low, stored)]
    if bias is not None:
        inputs += [None] * (4 - len(inputs)) + [bias]
    attributes: dict[str, int | float | str] = {
        "K": width,
        "N": rows,
        "bits": stored.bits,
        "block_size": stored.group_size,
        "accuracy_level": INT8_ACTIVATIONS,
    }

    def product(rows: ir.Value) -> ir.Value:
        return low.graph.op("MatMulNBits", [rows, *inputs], name, domain=MICROSOFT, attributes={**attributes})

    return low.rows.multiply(x, name, product) if needs_even_rows(stored.bits, stored.group_size) else product(x)


def _matmul_bnb4(low: SliceLowering, x: ir.Value, stored: QuantizedMatrix, name: str) -> ir.Value:
    """Codes and scales are flat there; blocks do not cross rows, for they divide the width."""
    rows, width = stored.shape
    codes = low.weights.codes(stored, "codes", (rows * width // 2,))
    scales = low.weights.scales(stored, (rows * stored.groups,), "absmax")
    attributes: dict[str, int | float | str] = {
        "K": width,
        "N": rows,
        "block_size": stored.group_size,
        "quant_type": NF4,
    }
    inputs = [x, low.graph.initializer(codes), low.graph.initializer(scales)]
    return low.graph.op("MatMulBnb4", inputs, name, domain=MICROSOFT, attributes={**attributes})


def _fp8(low: SliceLowering, stored: QuantizedMatrix) -> ir.Value:
    """The matrix in float32. ONNX Runtime does not fold a DequantizeLinear when it loads the engine, so the weights
    stay bytes in memory, and each product decodes its own."""
    tensors = [
        low.weights.codes(stored, "codes", stored.shape, ir.DataType.FLOAT8E4M3FN),
        low.weights.scales(stored, stored.shape[:1], "row_scales"),
    ]
    inputs = [low.graph.initializer(tensor) for tensor in tensors]
    # Decoding is a quarter faster so than with rows as blocks.
    return low.graph.op("DequantizeLinear", inputs, f"{stored.name}.dequantize", attributes={"axis": 0})


def parameters(low: SliceLowering, stored: QuantizedMatrix) -> list[ir.Value]:
    """Scales [N, groups] and, if asymmetric, zero points [N, bytes] as initializers."""
    rows = stored.shape[0]
    tensors = [low.weights.scales(stored, (rows, stored.groups))]
    if stored.zero_points is not None:
        shape = (rows, stored.zero_point_bytes)
        name = f"{stored.name}.zero_points"
        tensors.append(low.weights.tensor(name, stored.zero_points, ir.DataType.UINT8, shape))
    return [low.graph.initializer(tensor) for tensor in tensors]
