"""Insert a recipe's precisions into the canonical model: DequantizeLinear or Cast between weights and their uses."""

from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes

from calibration.coverage import actual_precision
from exporter.core.canonical import CanonicalModel, CheckpointWeight, Slice, Weight
from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision, Recipe

CODES = {
    ("int4", True): ir.DataType.INT4,
    ("int4", False): ir.DataType.UINT4,
    ("int6", True): ir.DataType.INT8,
    ("int8", True): ir.DataType.INT8,
    ("int8", False): ir.DataType.UINT8,
}
HALVES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}


def apply_recipe(model: CanonicalModel, recipe: Recipe, config: ModelConfig) -> CanonicalModel:
    """The same model with the recipe's precisions; `model` is left as it is.

    Layers that share a structure still share one afterwards. Norms, biases and rotary tables stay fp32, and so do
    matrices whose width the group size does not divide (`calibration.coverage` lists them).
    """
    converted: dict[tuple[int, tuple[tuple[str, Precision], ...]], ir.Model] = {}

    def convert(part: Slice) -> Slice:
        precisions = _precisions(part, recipe, config)
        key = (id(part.structure), tuple(sorted(precisions.items(), key=lambda item: item[0])))
        if key not in converted:
            converted[key] = _convert_structure(part.structure, precisions)
        weights = {name: _with_precision(weight, precisions.get(name)) for name, weight in part.weights.items()}
        return Slice(part.kind, part.index, converted[key], weights)

    return CanonicalModel(convert(model.embedding), [convert(layer) for layer in model.layers], convert(model.head))


class InsertPrecision(ir.passes.InPlacePass):
    """Give the weight inputs named in `precisions` their stored type.

    An integer weight `w` becomes `w.codes`, `w.scales` and, if asymmetric, `w.zero_points`, joined by a blocked
    DequantizeLinear (opset 24, axis 1) whose output takes the name `w`. A half-precision one keeps its name and gets
    a Cast to float. Does not touch fp32 weights or inputs it is not told of.
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
                insert = _insert_dequantize if precision.is_integer else _insert_cast
                insert(graph, inputs[name], precision)
                changed = True
        return ir.passes.PassResult(model, changed)


def _insert_dequantize(graph: ir.Graph, weight: ir.Value, precision: Precision) -> None:
    assert weight.shape is not None and weight.name is not None and precision.group_size is not None
    name, (rows, width) = weight.name, weight.shape
    assert isinstance(width, int)
    groups = ir.Shape([rows, width // precision.group_size])
    codes_type = ir.TensorType(CODES[precision.kind, precision.symmetric])
    stored = [
        ir.Value(name=f"{name}.codes", shape=ir.Shape([rows, width]), type=codes_type),
        ir.Value(name=f"{name}.scales", shape=groups, type=ir.TensorType(ir.DataType.FLOAT)),
    ]
    if not precision.symmetric:
        stored.append(ir.Value(name=f"{name}.zero_points", shape=groups, type=codes_type))
    attributes = {"axis": 1, "block_size": precision.group_size}
    node = ir.node("DequantizeLinear", stored, attributes=attributes, name=f"{name}.dequantize")
    node.outputs[0].name = name
    _replace_input(graph, weight, stored, node)


def _insert_cast(graph: ir.Graph, weight: ir.Value, precision: Precision) -> None:
    stored = ir.Value(name=weight.name, shape=weight.shape, type=ir.TensorType(HALVES[precision.kind]))
    node = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT}, name=f"{weight.name}.cast")
    node.outputs[0].name = f"{weight.name}.float"
    _replace_input(graph, weight, [stored], node)


def _replace_input(graph: ir.Graph, weight: ir.Value, stored: list[ir.Value], node: ir.Node) -> None:
    """Put `stored` in the place of the input `weight`, whose uses now take the output of `node`."""
    restored = node.outputs[0]
    restored.shape, restored.type = weight.shape, ir.TensorType(ir.DataType.FLOAT)
    uses = list(weight.uses())
    for user, index in uses:
        user.replace_input_with(index, restored)
    position = list(graph.inputs).index(weight)
    graph.inputs[position : position + 1] = stored
    first = min((user for user, _ in uses), key=list(graph).index)
    graph.insert_before(first, node)


def _precisions(part: Slice, recipe: Recipe, config: ModelConfig) -> dict[str, Precision]:
    """The actual precision of every matrix of a slice, by its logical name."""
    if part.kind == "embedding":
        requested = recipe.embedding
    else:
        requested = recipe.linear if part.kind == "layer" else recipe.lm_head
    widths = {f"{name}.weight": width for name, width in _widths(config).items()}
    return {name: actual_precision(requested, widths[name]) for name in part.weights if name in widths}


def _widths(config: ModelConfig) -> dict[str, int]:
    """K of each matrix by the name it has in the canonical model, packed ones included, or in a plain layer."""
    widths = {name: shape[1] for name, shape in config.linear_shapes.items()}
    hidden = config.hidden_size
    packed = {"self_attn.qkv_proj": hidden, "mlp.gate_up_proj": hidden}
    return {**widths, **packed, "embed_tokens": hidden, "lm_head": hidden}


def _convert_structure(structure: ir.Model, precisions: dict[str, Precision]) -> ir.Model:
    return InsertPrecision(precisions)(structure.clone()).model


def _with_precision(weight: Weight, precision: Precision | None) -> Weight:
    if precision is None or not isinstance(weight, CheckpointWeight):
        return weight
    return replace(weight, precision=precision)
