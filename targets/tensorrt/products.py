"""Products with weights, one function for each form that a weight has in the file (formats.py).

Every product comes out in float32: as the type of an 8-bit or FP4 product, which an fp16 result would overflow before
its scales are applied, or by a Cast behind a half-precision one, which TensorRT takes into the product.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, ScaleValue
from targets.slice_weights import Matrix, Rounded
from targets.tensorrt.formats import form_of, rounds_inputs
from targets.tensorrt.lowering import SliceLowering
from targets.tensorrt.rounding import RoundedValue, round_input
from targets.tensorrt.typed_graph import FLOAT
from targets.tensorrt.weight_file import CodedMatrix


def product(low: SliceLowering, x: ir.Value, matrix: Matrix) -> ir.Value:
    """The canonical activation x [.., K] times a weight [N, K], transposed -> float32 [.., N]."""
    weight = matrix.weight
    if not isinstance(weight, CheckpointWeight) or matrix.part or not matrix.transposed:
        raise low.refuse(f"MatMul with {matrix.name} that is not a transposed weight matrix")
    name = matrix.name.removesuffix(".weight")
    if form_of(weight.precision) == "float":
        stored = low.graph.initializer(low.weights.floats(matrix.name, weight))
        return _multiply(low, _unrounded(low, x, weight), stored, name)
    coded = low.weights.coded(name, weight)
    if rounds_inputs(weight.precision):
        rounded = _rounded(low, x, matrix, weight, name)
        y = _multiply(low, rounded.value, _decoded(low, coded), name)
        return _scaled(low, y, coded, name, rounded.factor)
    decoded = low.graph.cast(_decoded(low, coded), low.half, name)
    return _scaled(low, _multiply(low, _unrounded(low, x, weight), decoded, name), coded, name)


def _multiply(low: SliceLowering, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    """x [.., K] in the type of a weight [N, K], times that weight transposed -> float32 [.., N]."""
    columns = low.graph.make("Transpose", [weight], f"{name}.transposed", attributes={"perm": [1, 0]})
    x = low.graph.cast(x, low.graph.dtype(weight), f"{name}.input")
    return low.graph.cast(low.graph.make("MatMul", [x, columns], name), FLOAT, name)


def _unrounded(low: SliceLowering, x: ir.Value, weight: CheckpointWeight) -> ir.Value:
    """What a weight multiplies that no rounded product follows: the input before the canonical rounding."""
    pending = low.values.get(x)
    if not isinstance(pending, Rounded):
        return low.tensor(x)
    if pending.group.activations != weight.precision.activations:
        raise low.refuse(f"an input is rounded as {pending.group.activations}, its weight is {weight.precision}")
    return low.tensor(pending.group.source)


def _rounded(low: SliceLowering, x: ir.Value, matrix: Matrix, weight: CheckpointWeight, name: str) -> RoundedValue:
    activations = weight.precision.activations
    pending = low.values.get(x)
    # The canonical graph has no nodes for nvfp4/tensor (exporter.core.rounded_input).
    if not isinstance(pending, Rounded) and not activations.startswith("nvfp4"):
        raise low.refuse(f"the input of {name} is not rounded, its weight is {weight.precision}")
    source = low.graph.cast(_unrounded(low, x, weight), FLOAT, f"{name}.input")
    scale = low.slice.weights.get(f"{matrix.name.removeprefix(low.prefix)}.input_scale")
    value = scale.value if isinstance(scale, ScaleValue) else None
    return round_input(low, source, activations, value, name)


def _decoded(low: SliceLowering, coded: CodedMatrix) -> ir.Value:
    """The matrix [N, K] in the type of its scales."""
    graph = low.graph
    codes, scales = graph.initializer(coded.codes), graph.initializer(coded.scales)
    if coded.matrix_scale is not None:
        total = low.scalar(f"{coded.name}.matrix_scale", coded.matrix_scale)
        scales = graph.make("DequantizeLinear", [scales, total], f"{coded.name}.scales.dequantize", FLOAT)
    rank = len(coded.scales.shape)
    attributes = {"axis": 1, "block_size": coded.group} if rank == 2 else {"axis": 0} if rank else {}
    return graph.make(
        "DequantizeLinear", [codes, scales], f"{coded.name}.dequantize", graph.dtype(scales), attributes={**attributes}
    )


def _scaled(low: SliceLowering, y: ir.Value, coded: CodedMatrix, name: str, factor: ir.Value | None = None) -> ir.Value:
    """float32 [.., N] times what decoding left out, and times the scale of each token."""
    if coded.factors is not None:
        rows = low.graph.initializer(ir.tensor(coded.factors, name=f"{name}.row_factors"))
        y = low.graph.make("Mul", [y, rows], f"{name}.times_row_factors")
    if coded.exponent:
        power = low.scalar(f"{name}.power_of_two", float(np.ldexp(1.0, coded.exponent)))
        y = low.graph.make("Mul", [y, power], f"{name}.times_power_of_two")
    return y if factor is None else low.graph.make("Mul", [y, factor], f"{name}.times_token_scale")


def bias(low: SliceLowering, y: ir.Value, vector: Matrix) -> ir.Value:
    """y float32 [.., N] plus a bias [N]."""
    name = vector.name.removesuffix(".bias")
    return low.graph.make("Add", [y, low.vector(replace(vector))], f"{name}.bias_add")
