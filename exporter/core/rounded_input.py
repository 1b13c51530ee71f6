"""Rounded inputs of matrices in the canonical model: the nodes that say so, built and recognised.

`tensor` (int8 or fp8): QuantizeLinear(x, s) then DequantizeLinear(q, s), with the graph input s = `w.input_scale` [1].
`token`: the scale is computed from x [.., K] as it comes, one for each row of K values:

    s = Max(Div(ReduceMax(Abs(x), axes [-1], keepdims 1), top), least)    [.., 1]
    QuantizeLinear(x, s), DequantizeLinear(q, s), both with axis -1 and block_size K

top is 127 for int8 and 448 for fp8; least, 2^-126, keeps rows of zeros zero. In numbers, for both:
int8: clip(rint(x / s), -128, 127) * s, halves to even; fp8: E4M3(x / s) * s, saturating at 448, halves to even.

`nvfp4/tensor` has no nodes, for no CPU runtime has FP4: the graph input `w.input_scale` [1] lies beside the weight,
unused, for the targets that round so. The canonical model, run as it is, leaves that input as it is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Imported nowhere else here: core must load where the ONNX packages are not installed.
    import onnx_ir as ir

TOPS = {"int8": 127.0, "fp8": 448.0}
"""What the largest magnitude of a token is mapped to."""
UNROUNDED = ("nvfp4/tensor",)
"""What the canonical model asks for by a scale alone, without nodes."""
LEAST_SCALE = 2.0**-126
CODE_TYPES = {"int8": "INT8", "fp8": "FLOAT8E4M3FN"}
"""The ONNX type of rounded inputs."""
DATA_TYPES = {3: "int8", 17: "fp8"}
"""onnx.TensorProto.DataType of `output_dtype`, by what it is called here."""


@dataclass(frozen=True)
class RoundedInput:
    """A value that is another one rounded and made float again.

    `source` is that other value, `activations` how it was rounded (one of exporter.core.recipe.ACTIVATIONS), `scale`
    the graph input with its scale for `tensor` (None for `token`), `nodes` all nodes in between, in order.
    """

    source: "ir.Value"
    activations: str
    scale: "ir.Value | None"
    nodes: "tuple[ir.Node, ...]"

    @property
    def kind(self) -> str:
        """`int8` or `fp8`."""
        return self.activations.partition("/")[0]

    @property
    def per_token(self) -> bool:
        return self.scale is None


def match_rounded_input(value: "ir.Value | None") -> RoundedInput | None:
    """The rounding that ends in `value`, such as the first input of a MatMul; None where there is none.

    Does not match where the steps in between differ in any way from those above, or are used by others too.
    """
    dequantize = _producer(value, "DequantizeLinear", inputs=2)
    quantize = _producer(dequantize.inputs[0], "QuantizeLinear", inputs=2) if dequantize else None
    if dequantize is None or quantize is None or len(quantize.outputs[0].uses()) != 1:
        return None
    source, scale = quantize.inputs
    kind = DATA_TYPES.get(quantize.attributes.get_int("output_dtype", 0))
    if source is None or scale is None or kind is None or dequantize.inputs[1] is not scale:
        return None
    if not quantize.attributes.get_int("saturate", 1):
        return None
    if scale.is_graph_input() and not (_block(quantize) or _block(dequantize)):
        return RoundedInput(source, f"{kind}/tensor", scale, (quantize, dequantize))
    steps = _token_scale(scale, source, kind)
    if steps is None or not _whole_rows(quantize) or not _whole_rows(dequantize):
        return None
    return RoundedInput(source, f"{kind}/token", None, (*steps, quantize, dequantize))


def _token_scale(scale: "ir.Value", source: "ir.Value", kind: str) -> "tuple[ir.Node, ...] | None":
    """The nodes that compute a token's scale from `source`, in order."""
    most = _producer(scale, "Max", inputs=2)
    divide = _producer(most.inputs[0], "Div", inputs=2) if most else None
    largest = _producer(divide.inputs[0], "ReduceMax", inputs=2) if divide else None
    magnitude = _producer(largest.inputs[0], "Abs", inputs=1) if largest else None
    if most is None or divide is None or largest is None or magnitude is None or magnitude.inputs[0] is not source:
        return None
    if not (_is(most.inputs[1], LEAST_SCALE) and _is(divide.inputs[1], TOPS[kind]) and _is(largest.inputs[1], -1)):
        return None
    if largest.attributes.get_int("keepdims", 1) != 1 or len(scale.uses()) != 2:
        return None
    steps = (magnitude, largest, divide, most)
    return steps if all(len(step.outputs[0].uses()) == 1 for step in steps[:-1]) else None


def _producer(value: "ir.Value | None", kind: str, *, inputs: int) -> "ir.Node | None":
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and len(node.inputs) == inputs else None


def _block(node: "ir.Node") -> int:
    return node.attributes.get_int("block_size", 0)


def _whole_rows(node: "ir.Node") -> bool:
    """Whether a scale holds for a block along the last axis: its size is that of the row, or no scale would fit."""
    return node.attributes.get_int("axis", 1) == -1 and _block(node) > 0


def _is(value: "ir.Value | None", number: float) -> bool:
    """Whether a value is a constant of one element, this number."""
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(())) == np.float32(number)
