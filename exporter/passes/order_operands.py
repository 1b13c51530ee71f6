"""One way to write commutative and equivalent arithmetic, so that later rules have one form to match."""

import onnx_ir as ir

from exporter.core.canonical import Slice
from exporter.passes.editing import scalar_of
from exporter.passes.rule import Context, Outcome

COMMUTATIVE = ("Add", "Mul")


def order_operands(piece: Slice, context: Context) -> Outcome:
    """Put weights and constants second in Add and Mul; write 1 / x as Reciprocal.

    Does not fire where both operands are activations, nor for Div with another numerator.
    """
    fired = 0
    for node in piece.structure.graph:
        if (
            node.op_type in COMMUTATIVE
            and _is_parameter(node.inputs[0], piece)
            and not _is_parameter(node.inputs[1], piece)
        ):
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
            fired += 1
        elif node.op_type == "Div" and scalar_of(node.inputs[0]) == 1.0 and _is_float(node.inputs[0]):
            node.op_type = "Reciprocal"
            node.replace_input_with(0, node.inputs[1])
            node.resize_inputs(1)
            fired += 1
    return Outcome(fired)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT


def _is_parameter(value: ir.Value | None, piece: Slice) -> bool:
    return value is not None and (value.const_value is not None or value.name in piece.weights)
