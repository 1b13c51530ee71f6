"""What of a slice depends on weights alone, split off: computed once a layer, not once a step.

With ONNX Runtime's optimizer off nothing is folded, and every decode step would transpose and dequantize all
weights again. The split changes where nodes run, not what they compute.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class SplitSlice:
    """`prologue` maps weight inputs to ready weights (None if nothing is to be computed); `body` does the rest."""

    prologue: ir.Model | None
    body: ir.Model


def split_prologue(structure: ir.Model, weights: set[str]) -> SplitSlice:
    """Split a structure; `weights` names its weight inputs. The row count of every weight is made free.

    So head and embedding can be run with some rows of the vocabulary, whatever count was traced.
    """
    ready = _boundary(structure, weights)
    body = structure.clone()
    _free_rows(body, weights)
    _replace_by_inputs(body.graph, ready)
    _drop_unused(body, weights)
    if not ready:
        return SplitSlice(None, body)
    prologue = structure.clone()
    _free_rows(prologue, weights)
    values = _values(prologue.graph)
    del prologue.graph.outputs[:]
    prologue.graph.outputs.extend(_typed(values[name]) for name in ready)
    _drop_unused(prologue, {value.name or "" for value in prologue.graph.inputs})
    return SplitSlice(prologue, body)


def _boundary(structure: ir.Model, weights: set[str]) -> list[str]:
    """Names of values made of weights and constants alone that other nodes, or the outputs, need."""
    graph = structure.graph
    constant = set(graph.initializers.values())
    derived: set[ir.Value] = {value for value in graph.inputs if value.name in weights}
    computed: list[ir.Value] = []
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not inputs:
            constant.update(node.outputs)
        elif all(value in derived or value in constant for value in inputs):
            (derived if any(value in derived for value in inputs) else constant).update(node.outputs)
            computed.extend(value for value in node.outputs if value in derived)
    return [value.name or "" for value in computed if any(use.node.outputs[0] not in derived for use in value.uses())]


def _replace_by_inputs(graph: ir.Graph, names: list[str]) -> None:
    values = _values(graph)
    for name in names:
        old = values[name]
        old.name = f"{name}/computed"
        new = ir.Value(name=name, type=old.type or ir.TensorType(FLOAT))
        old.replace_all_uses_with(new)
        graph.inputs.append(new)


def _drop_unused(model: ir.Model, removable: set[str]) -> None:
    RemoveUnusedNodesPass()(model)
    outputs = set(model.graph.outputs)
    unused = [v for v in model.graph.inputs if v.name in removable and not v.uses() and v not in outputs]
    for value in unused:
        model.graph.inputs.remove(value)


def _free_rows(model: ir.Model, weights: set[str]) -> None:
    """Forget the first dimension of weights and every shape that may follow from it."""
    for value in model.graph.inputs:
        if value.name in weights and value.shape is not None and len(value.shape):
            value.shape = ir.Shape([f"{value.name}_rows", *list(value.shape)[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {value.name or "": value for node in graph for value in node.outputs}


def _typed(value: ir.Value) -> ir.Value:
    if value.type is None:
        value.type = ir.TensorType(FLOAT)
    return value
