"""Round the inputs of matrices: QuantizeLinear and DequantizeLinear between an activation and MatMul."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from calibration.insert_weights import FLOAT, constant
from exporter.core.rounded_input import CODE_TYPES, LEAST_SCALE, TOPS, UNROUNDED


class RoundInputs(ir.passes.InPlacePass):
    """Round the input of every MatMul with a weight named in `activations`, as its value says (`int8/token`).

    The nodes are those of exporter.core.rounded_input (none for nvfp4); `tensor` adds a graph input
    `w.input_scale`, float [1], after the other inputs of the weight `w`. Weights are found by the value that carries
    their name, through a Transpose. Two matrices with the same input get a rounding each.
    """

    def __init__(self, activations: dict[str, str]) -> None:
        super().__init__()
        self.activations = activations

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        values = {value.name: value for node in graph for value in node.outputs}
        for name, activations in self.activations.items():
            for product in list(products_with(values[name])):
                _round(graph, product, name, activations)
        return ir.passes.PassResult(model, bool(self.activations))


def products_with(weight: ir.Value) -> Iterator[ir.Node]:
    """The MatMuls whose second input is a weight, or its transpose."""
    for node, index in weight.uses():
        if node.op_type == "Transpose":
            yield from products_with(node.outputs[0])
        elif node.op_type == "MatMul" and index == 1:
            yield node


def _round(graph: ir.Graph, product: ir.Node, weight: str, activations: str) -> None:
    kind, _, way = activations.partition("/")
    source = product.inputs[0]
    assert source is not None
    steps = _Steps(f"{weight}.input")
    scale = _static_scale(graph, weight) if way == "tensor" else _token_scale(graph, steps, source, kind)
    if activations in UNROUNDED:
        return
    # The scale of a token holds for its whole row: a block as wide as the row. Positions come before it.
    blocks = {} if way == "tensor" else {"axis": -1, "block_size": _width(product)}
    code_type = ir.DataType[CODE_TYPES[kind]]
    codes = steps.add("QuantizeLinear", [source, scale], "codes", output_dtype=code_type, **blocks)
    codes.type = ir.TensorType(code_type)
    rounded = steps.add("DequantizeLinear", [codes, scale], "rounded", **blocks)
    codes.shape = rounded.shape = source.shape
    product.replace_input_with(0, rounded)
    graph.insert_before(product, steps.nodes)


def _static_scale(graph: ir.Graph, weight: str) -> ir.Value:
    """The new graph input, behind those of its weight."""
    scale = ir.Value(name=f"{weight}.input_scale", shape=ir.Shape([1]), type=FLOAT)
    position = max(i for i, value in enumerate(graph.inputs) if (value.name or "").startswith(f"{weight}."))
    graph.inputs.insert(position + 1, scale)
    return scale


def _token_scale(graph: ir.Graph, steps: "_Steps", source: ir.Value, kind: str) -> ir.Value:
    axis = constant(graph, "last_axis", np.array([-1]))
    top = constant(graph, f"top.{kind}", np.array(TOPS[kind], np.float32))
    least = constant(graph, "least_scale", np.array(LEAST_SCALE, np.float32))
    magnitudes = steps.add("Abs", [source], "magnitudes")
    largest = steps.add("ReduceMax", [magnitudes, axis], "largest", keepdims=1)
    return steps.add("Max", [steps.add("Div", [largest, top], "plain_scale"), least], "token_scale")


def _width(product: ir.Node) -> int:
    """K of a MatMul [.., K] x [K, N], from its weight."""
    weight = product.inputs[1]
    assert weight is not None
    node = weight.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        shape, axis = node.inputs[0].shape, 1
    else:
        shape, axis = weight.shape, 0
    assert shape is not None
    width = shape[axis]
    assert isinstance(width, int)
    return width


class _Steps:
    """Nodes under construction, named after what they are for."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def add(self, kind: str, inputs: list[ir.Value], part: str, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"{self.prefix}.{part}")
        node.outputs[0].name, node.outputs[0].type = f"{self.prefix}.{part}", FLOAT
        self.nodes.append(node)
        return node.outputs[0]
