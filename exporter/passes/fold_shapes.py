"""Folding shape computations: afterwards no node asks for a size, whichever tracer made the graph."""

import numpy as np
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter.core.canonical import Slice
from exporter.passes.editing import add_constant
from exporter.passes.rule import Context, Outcome
from exporter.passes.symbolic import Dims, Symbolic, evaluate


def fold_shapes(piece: Slice, context: Context) -> Outcome:
    """Replace every int64 operand by a constant where its meaning is the same for all batch, step and past sizes.

    Reshape targets become 0 (copy), numbers and at most one -1; Expand targets 1 (keep) and numbers. Also writes
    the known sizes of all values into their `shape`. Does not fire for a target that no constant can express
    (two unknown sizes that are not copied in place), nor for operands that depend on sizes otherwise.
    """
    graph = piece.structure.graph
    known = evaluate(graph)
    fired = 0
    for node in graph:
        _annotate(known, node.outputs[0])
        if node.op_type in ("Reshape", "Expand"):
            fired += _fold_target(graph, known, node)
        elif known.integers.get(node.outputs[0]) is None:
            fired += sum(_fold_operand(graph, known, node, i) for i in range(len(node.inputs)))
    RemoveUnusedNodesPass()(piece.structure)
    return Outcome(fired)


def _annotate(known: Symbolic, value: ir.Value) -> None:
    shape, dtype = known.shapes.get(value), known.dtypes.get(value)
    if shape is not None:
        value.shape = ir.Shape([int(size) if isinstance(size, sympy.Integer) else str(size) for size in shape])
    if dtype is not None:
        value.type = ir.TensorType(dtype)


def _fold_target(graph: ir.Graph, known: Symbolic, node: ir.Node) -> int:
    source, target, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert source is not None and target is not None
    before, after = known.shapes.get(source), known.shapes.get(out)
    if before is None or after is None:
        return 0
    constant = _reshape_target(before, after) if node.op_type == "Reshape" else _expand_target(before, after)
    if constant is None:
        return 0
    node.attributes.pop("allowzero", None)
    node.replace_input_with(1, add_constant(graph, f"{out.name}_shape", constant))
    return 1


def _reshape_target(before: Dims, after: Dims) -> list[int] | None:
    """0 where a symbolic size stays in place, the number where it is one, -1 once for anything else."""
    target = []
    for i, size in enumerate(after):
        if isinstance(size, sympy.Integer):
            target.append(int(size))
        else:
            target.append(0 if i < len(before) and before[i] == size else -1)
    return target if target.count(-1) <= 1 else None


def _expand_target(before: Dims, after: Dims) -> list[int] | None:
    padded = (sympy.Integer(1),) * (len(after) - len(before)) + before
    target = [
        1 if old == new else int(new) if isinstance(new, sympy.Integer) else -1
        for old, new in zip(padded, after, strict=True)
    ]
    return target if -1 not in target else None


def _fold_operand(graph: ir.Graph, known: Symbolic, node: ir.Node, index: int) -> int:
    value = node.inputs[index]
    if value is None or value.producer() is None or (constant := known.constant(value)) is None:
        return 0
    if constant.ndim > 1 or constant.dtype != np.int64:
        return 0
    node.replace_input_with(index, _constant_like(graph, value, constant))
    return 1


def _constant_like(graph: ir.Graph, value: ir.Value, constant: np.ndarray) -> ir.Value:
    folded = add_constant(graph, f"{value.name}_folded", constant.reshape(-1).tolist())
    if constant.ndim == 0:
        folded.const_value, folded.shape = ir.tensor(constant, name=folded.name), ir.Shape([])
    return folded
