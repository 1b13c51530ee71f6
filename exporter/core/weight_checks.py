"""What the checker asks of a slice's weights: inputs in type and shape, how codes become weights, rounded inputs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.core.canonical import INTERFACES, CheckpointWeight, RotaryTable, ScaleValue, Slice, Weight
from exporter.core.config import ModelConfig
from exporter.core.number_formats import TABLE_KINDS
from exporter.core.recipe import Precision
from exporter.core.rounded_input import UNROUNDED, RoundedInput, match_rounded_input
from exporter.core.table_weight import TABLES, match_table_weight

if TYPE_CHECKING:
    # Not imported: core must load where the ONNX packages are not installed.
    import onnx_ir as ir

CODE_TYPES = {
    ("int4", True): "INT4",
    ("int4", False): "UINT4",
    ("int6", True): "INT8",
    ("int8", True): "INT8",
    ("int8", False): "UINT8",
    ("fp8", True): "FLOAT8E4M3FN",
    **{(kind, True): "UINT4" for kind in TABLE_KINDS},
}
FLOAT_TYPES = {"fp32": "FLOAT", "bf16": "BFLOAT16", "fp16": "FLOAT16"}
ROUNDING_OPERATORS = ("QuantizeLinear", "Abs", "Div", "Max")
"""Operators that stand nowhere else than before a matrix."""
Shape = tuple[int, ...]


def weight_faults(piece: Slice, config: ModelConfig) -> list[str]:
    """The inputs must be exactly those that `piece.weights` feed, each in its type and shape and used as such."""
    shapes = config.tensor_shapes
    unknown = [source for source in _sources(piece) if source not in shapes]
    if unknown:
        return [f"no checkpoint tensor is called {', '.join(unknown)}"]
    stacked = {
        name: _stacked_shape(weight, shapes)
        for name, weight in piece.weights.items()
        if isinstance(weight, CheckpointWeight)
    }
    expected = {
        name: feed
        for weight_name, weight in piece.weights.items()
        for name, feed in _feeds(weight_name, weight, stacked.get(weight_name, ())).items()
    }
    if faults := list(_input_faults(piece, expected)):
        return faults
    coded = (_use_fault(piece, name, shape) for name, shape in stacked.items())
    return [*(fault for fault in coded if fault), *_rounding_faults(piece)]


def unrounded_weights(piece: Slice) -> list[str]:
    """Weights whose precision asks for a rounding of the input that the graph does not compute."""
    coded = ((name, weight) for name, weight in piece.weights.items() if isinstance(weight, CheckpointWeight))
    return [name for name, weight in coded if weight.precision.activations in UNROUNDED]


def type_name(value: "ir.Value") -> str:
    return value.dtype.name if value.dtype is not None else "of no type"


def _sources(piece: Slice) -> list[str]:
    return [
        name for weight in piece.weights.values() if isinstance(weight, CheckpointWeight) for name in weight.sources
    ]


def _stacked_shape(weight: CheckpointWeight, shapes: dict[str, Shape]) -> Shape:
    parts = [shapes[source] for source in weight.sources]
    return (sum(part[0] for part in parts), *parts[0][1:])


def _feeds(name: str, weight: Weight, shape: Shape) -> dict[str, tuple[str, Shape]]:
    """Type and shape of each graph input that a weight, stacked to `shape`, feeds."""
    if isinstance(weight, ScaleValue):
        return {name: ("FLOAT", (1,))}
    if isinstance(weight, RotaryTable):
        return {name: ("FLOAT", (weight.length, len(weight.inverse_frequencies)))}
    precision: Precision = weight.precision
    if not precision.is_coded:
        return {name: (FLOAT_TYPES[precision.kind], shape)}
    codes = CODE_TYPES[precision.kind, precision.symmetric]
    groups = (shape[0], precision.groups(shape[-1]))
    feeds = {f"{name}.codes": (codes, shape), f"{name}.scales": ("FLOAT", groups)}
    return feeds if precision.symmetric else {**feeds, f"{name}.zero_points": (codes, groups)}


def _input_faults(piece: Slice, expected: dict[str, tuple[str, Shape]]) -> Iterator[str]:
    inputs = {value.name or "": value for value in piece.structure.graph.inputs}
    declared = set(expected) | set(INTERFACES[piece.kind][0])
    yield from (f"input {name!r} belongs to no weight" for name in inputs if name not in declared)
    for name, (dtype, shape) in expected.items():
        value = inputs.get(name)
        if value is None:
            yield f"no input {name!r} for a weight"
        elif type_name(value) != dtype:
            yield f"{name!r} is {type_name(value)}, not {dtype}"
        elif not _same_shape(value, shape):
            yield f"{name!r} has shape {value.shape}, not {list(shape)}"


def _same_shape(value: "ir.Value", shape: Shape) -> bool:
    """Equal sizes; a symbolic first size (rows of the vocabulary or of a rotary table) stands for any."""
    found = list(value.shape) if value.shape is not None else []
    return len(found) == len(shape) and all(
        size == want or (axis == 0 and not isinstance(size, int))
        for axis, (size, want) in enumerate(zip(found, shape, strict=True))
    )


def _use_fault(piece: Slice, name: str, shape: Shape) -> str:
    """Why a weight does not become one in the way of its precision; empty where it does."""
    weight = piece.weights[name]
    assert isinstance(weight, CheckpointWeight)
    precision, graph = weight.precision, piece.structure.graph
    inputs = {value.name: value for value in graph.inputs}
    if not precision.is_coded:
        users = {node.op_type for node, _ in inputs[name].uses()}
        half = precision.kind != "fp32" and users != {"Cast"}
        return f"{name!r} is {FLOAT_TYPES[precision.kind]} and must pass through a Cast first" if half else ""
    parts = ["codes", "scales"] if precision.symmetric else ["codes", "scales", "zero_points"]
    stored = [inputs[f"{name}.{part}"] for part in parts]
    restored = _table_fault if precision.kind in TABLE_KINDS else _dequantize_fault
    return restored(name, stored, precision, precision.group_of(shape[-1]))


def _dequantize_fault(name: str, stored: "list[ir.Value]", precision: Precision, group: int) -> str:
    """Codes, scales and zero points meet in one blocked DequantizeLinear."""
    users = [[node for node, _ in value.uses()] for value in stored]
    node = users[0][0] if users[0] else None
    if node is None or node.op_type != "DequantizeLinear" or any(each != [node] for each in users):
        return f"{' and '.join(value.name or '' for value in stored)} do not meet in one DequantizeLinear"
    if list(node.inputs) != stored:
        return f"the inputs of {name!r} do not meet each other in this order in DequantizeLinear"
    if node.attributes.get_int("axis", 1) != 1 or node.attributes.get_int("block_size", 0) != group:
        return f"{name!r} is not dequantized in blocks of {group} along axis 1"
    return ""


def _table_fault(name: str, stored: "list[ir.Value]", precision: Precision, group: int) -> str:
    """Codes pass through the table of their kind and meet their scales."""
    codes, scales = stored
    value: ir.Value | None = codes
    for _ in range(5):  # Cast, Gather, Reshape, Mul, Reshape
        uses = list(value.uses()) if value is not None else []
        value = uses[0].node.outputs[0] if len(uses) == 1 else None
    found = match_table_weight(value)
    if found is None or found.codes is not codes or found.scales is not scales or len(scales.uses()) != 1:
        return f"codes and scales of {name!r} do not meet as a table weight's do"
    if (found.table, found.group) != (TABLES[precision.kind], group):
        return f"{name!r} is looked up in {found.table} by {found.group}, stored as {precision.describe()}"
    return ""


def _rounding_faults(piece: Slice) -> Iterator[str]:
    """Inputs of matrices are rounded as their precision says, and nothing else is."""
    rounding: set[ir.Node] = set()
    for node in piece.structure.graph:
        if node.op_type == "MatMul":
            name, found = _weight_name(node), match_rounded_input(node.inputs[0])
            rounding.update(found.nodes if found else ())
            yield from _activation_faults(piece, name, found)
    for node in piece.structure.graph:
        inner = node.op_type == "DequantizeLinear" and not (node.inputs[0] and node.inputs[0].is_graph_input())
        if (inner or node.op_type in ROUNDING_OPERATORS) and node not in rounding:
            yield f"{node.op_type} at {node.outputs[0].name!r} rounds no input of a matrix"


def _activation_faults(piece: Slice, name: str, found: RoundedInput | None) -> Iterator[str]:
    weight = piece.weights.get(name)
    asked = weight.precision.activations if isinstance(weight, CheckpointWeight) else ""
    asked = "" if asked in UNROUNDED else asked
    done = found.activations if found else ""
    if asked != done:
        yield f"the input of {name!r} is rounded to {done or 'nothing'}, not to {asked or 'nothing'}"
    elif found and found.scale is not None and found.scale.name != f"{name}.input_scale":
        yield f"the input of {name!r} has the scale {found.scale.name!r}"


def _weight_name(product: "ir.Node") -> str:
    """The logical name of the weight of a MatMul, through its Transpose."""
    value = product.inputs[1]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        value = node.inputs[0]
    return value.name or "" if value is not None else ""
