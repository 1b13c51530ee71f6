"""Removing operators that return their first input unchanged."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter.core.canonical import Slice
from exporter.passes.editing import bypass, integers_of
from exporter.passes.rule import Context, Outcome

INT64_MAX = np.iinfo(np.int64).max


def remove_no_ops(piece: Slice, context: Context) -> Outcome:
    """Remove Identity, Cast to the type it already has, Slice of everything, Expand to the same shape.

    Does not fire for a Cast whose input type is unknown, a Slice with a step, a start or an end inside the axis, an
    Expand that repeats anything, nor where an input of the slice would become its output.
    """
    fired = 0
    for node in tuple(piece.structure.graph):
        if _is_no_op(node) and not _joins_interface(node):
            bypass(node)
            fired += 1
    RemoveUnusedNodesPass()(piece.structure)
    return Outcome(fired)


def _joins_interface(node: ir.Node) -> bool:
    source = node.inputs[0]
    return (
        node.outputs[0].is_graph_output()
        and source is not None
        and (source.is_graph_input() or source.is_graph_output())
    )


def _is_no_op(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    if node.domain or source is None:
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        return source.dtype is not None and node.attributes["to"].as_int() == source.dtype
    if node.op_type == "Slice":
        return _takes_everything(node, source)
    return node.op_type == "Expand" and integers_of(node.inputs[1]) == [1] * len(source.shape or [None])


def _takes_everything(node: ir.Node, source: ir.Value) -> bool:
    starts, ends, axes, steps = (integers_of(value) for value in (*node.inputs[1:], *[None] * 2)[:4])
    if starts is None or ends is None or axes is None or source.shape is None:
        return False
    return (steps or [1] * len(axes)) == [1] * len(axes) and all(
        start == 0 and (end == INT64_MAX or (isinstance(size := source.shape[axis], int) and end >= size))
        for start, end, axis in zip(starts, ends, axes, strict=True)
    )
