"""Small edits on a slice's graph that several passes share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT


def add_constant(graph: ir.Graph, stem: str, data: Sequence[int]) -> ir.Value:
    """A fresh int64 [n] initializer named after `stem`."""
    name = fresh_name(graph, stem)
    value = ir.Value(name=name, const_value=ir.tensor(list(data), dtype=INT64, name=name))
    value.shape, value.type = ir.Shape([len(data)]), ir.TensorType(INT64)
    graph.initializers.add(value)
    return value


def fresh_name(graph: ir.Graph, stem: str) -> str:
    """`stem`, numbered if the graph has an initializer of that name."""
    name, number = stem, 0
    while name in graph.initializers:
        number += 1
        name = f"{stem}_{number}"
    return name


def add_input(graph: ir.Graph, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
    """A new graph input, after the others."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def new_node(
    kind: str, inputs: Sequence[ir.Value | None], outputs: Sequence[str], attributes: dict[str, Any] | None = None
) -> ir.Node:
    """A node whose outputs are named here: an automatic name might be that of another value in the raw graph."""
    node = ir.node(kind, inputs, attributes=attributes or {}, num_outputs=len(outputs))
    for value, name in zip(node.outputs, outputs, strict=True):
        value.name = name
    return node


def find_input(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for value in graph.inputs if value.name == name), None)


def bypass(node: ir.Node) -> None:
    """Remove a node whose single output equals its first input; a name of the interface moves to that input."""
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None and node.graph is not None
    is_output, name = out.is_graph_output(), out.name
    ir.convenience.replace_all_uses_with(out, source, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
    if is_output and name is not None:
        rename(source, name)


def rename(value: ir.Value, name: str) -> None:
    """Give a value another name and remember its first one, so that raw and fused graphs can be compared."""
    value.metadata_props.setdefault("raw_name", value.name or "")
    value.name = name


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Let `new` stand for `old` everywhere, under its name."""
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initializer, None for anything else."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def scalar_of(value: ir.Value | None) -> float | None:
    """The content of a one-element initializer."""
    array = constant_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def integers_of(value: ir.Value | None) -> list[int] | None:
    """The content of an int64 initializer, flattened."""
    array = constant_of(value)
    return array.reshape(-1).tolist() if array is not None and array.dtype == np.int64 else None


def shortest_float(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-06 rather than 9.999999974752427e-07."""
    return float(str(np.float32(value)))
