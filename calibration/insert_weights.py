"""Give weights their stored type: the nodes between stored weights and their uses."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes

from exporter.core.number_formats import TABLE_KINDS, decode_table
from exporter.core.recipe import Precision
from exporter.core.table_weight import TABLES

CODES = {
    ("int4", True): ir.DataType.INT4,
    ("int4", False): ir.DataType.UINT4,
    ("int6", True): ir.DataType.INT8,
    ("int8", True): ir.DataType.INT8,
    ("int8", False): ir.DataType.UINT8,
    ("fp8", True): ir.DataType.FLOAT8E4M3FN,
    **{(kind, True): ir.DataType.UINT4 for kind in TABLE_KINDS},
}
HALVES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
FLOAT = ir.TensorType(ir.DataType.FLOAT)


class InsertWeights(ir.passes.InPlacePass):
    """Give the weight inputs named in `precisions` their stored type.

    A weight `w` in integers or fp8 becomes `w.codes`, `w.scales` and, if asymmetric, `w.zero_points`, joined by a
    blocked DequantizeLinear (opset 24, axis 1); one in nf4, nvfp4 or mxfp4 becomes `w.codes` and `w.scales`, joined as
    exporter.core.table_weight has it. Either way the result takes the name `w`. A half-precision one keeps its name and
    gets a Cast to float. Does not touch fp32 weights or inputs it is not told of.
    """

    def __init__(self, precisions: dict[str, Precision]) -> None:
        super().__init__()
        self.precisions = precisions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        changed = False
        for name, precision in self.precisions.items():
            if precision.kind != "fp32":
                _insertion(precision)(graph, inputs[name], precision)
                changed = True
        return ir.passes.PassResult(model, changed)


def constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """The initializer `quantization.name`, made where the graph has none yet."""
    name = f"quantization.{name}"
    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def _insertion(precision: Precision) -> Callable[[ir.Graph, ir.Value, Precision], None]:
    if precision.kind in TABLE_KINDS:
        return _insert_table
    return _insert_dequantize if precision.is_coded else _insert_cast


def _stored_inputs(weight: ir.Value, precision: Precision) -> list[ir.Value]:
    """Codes, scales and, for asymmetric integers, zero points of a weight [N, K]."""
    assert weight.shape is not None and weight.name is not None
    rows, width = weight.shape
    assert isinstance(width, int)
    groups = ir.Shape([rows, precision.groups(width)])
    codes = ir.TensorType(CODES[precision.kind, precision.symmetric])
    stored = [
        ir.Value(name=f"{weight.name}.codes", shape=ir.Shape([rows, width]), type=codes),
        ir.Value(name=f"{weight.name}.scales", shape=groups, type=FLOAT),
    ]
    if not precision.symmetric:
        stored.append(ir.Value(name=f"{weight.name}.zero_points", shape=groups, type=codes))
    return stored


def _width(weight: ir.Value) -> int:
    assert weight.shape is not None
    width = weight.shape[1]
    assert isinstance(width, int)
    return width


def _insert_dequantize(graph: ir.Graph, weight: ir.Value, precision: Precision) -> None:
    stored = _stored_inputs(weight, precision)
    attributes = {"axis": 1, "block_size": precision.group_of(_width(weight))}
    node = ir.node("DequantizeLinear", stored, attributes=attributes, name=f"{weight.name}.dequantize")
    node.outputs[0].name = weight.name
    _replace_input(graph, weight, stored, [node])


def _insert_table(graph: ir.Graph, weight: ir.Value, precision: Precision) -> None:
    codes, scales = stored = _stored_inputs(weight, precision)
    table, group = TABLES[precision.kind], precision.group_of(_width(weight))
    levels = constant(graph, f"levels.{table}", decode_table(precision.kind))
    in_groups = constant(graph, f"in_groups.{group}", np.array([0, -1, group]))
    one_each = constant(graph, "in_groups.1", np.array([0, -1, 1]))
    in_rows = constant(graph, "in_rows", np.array([0, -1]))
    nodes: list[ir.Node] = []

    def step(kind: str, inputs: list[ir.Value], part: str, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"{weight.name}.{part}")
        node.outputs[0].name = f"{weight.name}.{part}"
        node.outputs[0].type = FLOAT
        nodes.append(node)
        return node.outputs[0]

    index = step("Cast", [codes], "index", to=ir.DataType.INT32)
    index.type = ir.TensorType(ir.DataType.INT32)
    values = step("Reshape", [step("Gather", [levels, index], "levels", axis=0), in_groups], "values")
    product = step("Mul", [values, step("Reshape", [scales, one_each], "factors")], "product")
    step("Reshape", [product, in_rows], "restored").name = weight.name
    _replace_input(graph, weight, stored, nodes)


def _insert_cast(graph: ir.Graph, weight: ir.Value, precision: Precision) -> None:
    stored = ir.Value(name=weight.name, shape=weight.shape, type=ir.TensorType(HALVES[precision.kind]))
    node = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT}, name=f"{weight.name}.cast")
    node.outputs[0].name = f"{weight.name}.float"
    _replace_input(graph, weight, [stored], [node])


def _replace_input(graph: ir.Graph, weight: ir.Value, stored: list[ir.Value], nodes: list[ir.Node]) -> None:
    """Put `stored` in the place of the input `weight`, whose uses now take the output of the last of `nodes`."""
    restored = nodes[-1].outputs[0]
    restored.shape, restored.type = weight.shape, FLOAT
    uses = list(weight.uses())
    for user, index in uses:
        user.replace_input_with(index, restored)
    position = list(graph.inputs).index(weight)
    graph.inputs[position : position + 1] = stored
    first = min((user for user, _ in uses), key=list(graph).index)
    graph.insert_before(first, nodes)
