"""Rounded inputs of products: the recipe's rounding, in float32, as Q/DQ that TensorRT takes into an 8-bit product.

The scale of a token cannot be an input of QuantizeLinear there (it wants constants), so x is divided by it first:
Q and DQ then have the scale 1, and the product is multiplied by the token's scale behind. rint(x / s) is the recipe's
code, so nothing is rounded twice.
"""

from dataclasses import dataclass

import onnx_ir as ir

from exporter.core.rounded_input import LEAST_SCALE, TOPS
from targets.tensorrt.block_scales import BLOCK
from targets.tensorrt.lowering import SliceLowering
from targets.tensorrt.typed_graph import FLOAT, TENSORRT

CODE_TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True)
class RoundedValue:
    """What a product multiplies, float32 [.., K], and what the product is then to be multiplied by, [.., 1]."""

    value: ir.Value
    factor: ir.Value | None = None


def round_input(low: SliceLowering, x: ir.Value, activations: str, scale: float | None, name: str) -> RoundedValue:
    """x float32 [.., K] rounded as `activations` says (`int8/token`); `scale` is the calibrated one of `tensor`."""
    kind, _, way = activations.partition("/")
    if (way == "tensor") != (scale is not None):
        raise low.refuse(f"the input of {name} is rounded as {activations} with the scale {scale}")
    if kind == "nvfp4" and scale is not None:
        return RoundedValue(_round_blocks(low, x, scale, name))
    if scale is not None:
        return RoundedValue(_quantized(low, x, low.scalar(f"{name}.input_scale", scale), kind, name))
    factor = _token_scale(low, x, kind, name)
    divided = low.graph.make("Div", [x, factor], f"{name}.input.divided")
    return RoundedValue(_quantized(low, divided, low.scalar("unit_scale", 1.0), kind, name), factor)


def _quantized(low: SliceLowering, x: ir.Value, scale: ir.Value, kind: str, name: str) -> ir.Value:
    code_type = CODE_TYPES[kind]
    codes = low.graph.make(
        "QuantizeLinear", [x, scale], f"{name}.input.quantize", code_type, attributes={"output_dtype": int(code_type)}
    )
    return low.graph.make("DequantizeLinear", [codes, scale], f"{name}.input.dequantize", FLOAT)


def _token_scale(low: SliceLowering, x: ir.Value, kind: str, name: str) -> ir.Value:
    """max|x| / top of each row, float32 [.., 1]; at least LEAST_SCALE, so that rows of zeros stay zero."""
    make, name = low.graph.make, f"{name}.input"
    magnitudes = make("Abs", [x], f"{name}.magnitudes")
    largest = make("ReduceMax", [magnitudes, low.graph.constant([-1])], f"{name}.largest", attributes={"keepdims": 1})
    plain = make("Div", [largest, low.scalar(f"top.{kind}", TOPS[kind])], f"{name}.plain_scale")
    return make("Max", [plain, low.scalar("least_scale", LEAST_SCALE)], f"{name}.scale")


def _round_blocks(low: SliceLowering, x: ir.Value, scale: float, name: str) -> ir.Value:
    """Blocks of 16 to E2M1, each with the E4M3 scale max|x| / 6 / `scale`, by the one operator that TensorRT has for
    it (onnx-tensorrt, docs/operators.md: TRT_FP4DynamicQuantize)."""
    graph = low.graph
    total = low.scalar(f"{name}.input_scale", scale)
    attributes: dict[str, int | float | str] = {
        "axis": -1,
        "block_size": BLOCK,
        "scale_type": int(ir.DataType.FLOAT8E4M3FN),
    }
    codes = graph.make(
        "TRT_FP4DynamicQuantize", [x, total], f"{name}.input.quantize", ir.DataType.FLOAT4E2M1,
        domain=TENSORRT, outputs=2, attributes={**attributes},
    )  # fmt: skip
    scales = graph.last_node.outputs[1]
    graph.set_type(scales, ir.DataType.FLOAT8E4M3FN)
    wide = graph.make("DequantizeLinear", [scales, total], f"{name}.input.scales", FLOAT)
    blocks = {"axis": -1, "block_size": BLOCK}
    return graph.make("DequantizeLinear", [codes, wide], f"{name}.input.dequantize", FLOAT, attributes={**blocks})
