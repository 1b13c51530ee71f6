"""Raising a raw graph's opset without touching its nodes."""

import onnx_ir as ir

from exporter.core.errors import UnsupportedError

# Operators whose versions up to opset 24 only admit more types, or add attributes that default to the old meaning
# (ONNX Changelog.md; held against the installed schemas by tests/trace/test_opset.py).
UNCHANGED_SINCE_18 = frozenset(
    [
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Cos",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Identity",
        "MatMul",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "ReduceMean",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
OLDEST = 18


def convert_opset(model: ir.Model, version: int) -> None:
    """Declare `version` for a graph of opset 18 or newer; refuses operators that are not known to be unchanged."""
    found = model.graph.opset_imports.get("", 0)
    others = {node.op_identifier() for node in model.graph if node.domain or node.op_type not in UNCHANGED_SINCE_18}
    if others or not OLDEST <= found <= version:
        names = ", ".join(sorted("::".join(filter(None, other[:2])) for other in others)) or "none"
        raise UnsupportedError(
            "trace.opset",
            f"the traced graph has opset {found} and operators outside the known set: {names}",
            f"install the torch and transformers versions that enginesmith asks for; opset {version} is needed",
        )
    model.graph.opset_imports.clear()
    model.graph.opset_imports[""] = version
