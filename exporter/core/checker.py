"""The canonical model's grammar, checked between stages: operators, interface, weights, order of slices."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.core.canonical import (
    EMBEDDING_INPUTS,
    HEAD_INPUTS,
    LAYER_INPUTS,
    LAYER_OUTPUTS,
    OPSET,
    CanonicalModel,
    CheckpointWeight,
    RotaryTable,
    ScaleValue,
    Slice,
    Weight,
)
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.core.recipe import Precision

if TYPE_CHECKING:
    # Imported lazily below: core must load where the ONNX packages are not installed.
    import onnx_ir as ir

OPERATORS = frozenset(
    [
        *("Gather", "MatMul", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention", "Swish"),
        *("Mul", "Add", "Slice", "ReduceMax", "Reshape", "Transpose", "Split", "Cast", "DequantizeLinear"),
        *("Concat", "QuantizeLinear"),
    ]
)
INTERFACES = {
    "embedding": (EMBEDDING_INPUTS, ("hidden",)),
    "layer": (LAYER_INPUTS, LAYER_OUTPUTS),
    "head": (HEAD_INPUTS, ("logits",)),
}
INTEGER_INPUTS = ("input_ids", "position_ids", "write_indices", "nonpad_kv_seqlen", "rows")
CODE_TYPES = {
    ("int4", True): "INT4",
    ("int4", False): "UINT4",
    ("int6", True): "INT8",
    ("int8", True): "INT8",
    ("int8", False): "UINT8",
}
FLOAT_TYPES = {"fp32": "FLOAT", "bf16": "BFLOAT16", "fp16": "FLOAT16"}
Shapes = dict[str, tuple[int, ...]]
# Shapes, widths and bounds: a handful of numbers, never a weight.
MAX_CONSTANT_ELEMENTS = 16


def check_canonical(model: CanonicalModel, config: ModelConfig) -> None:
    """Raise BudgetError (`canonical.invalid`), naming the slice and every fault found in it.

    Each distinct structure is checked once, each slice's weights always. Weight data is not read.
    """
    if faults := list(_order_faults(model, config)):
        raise _invalid("the model", faults)
    checked: set[tuple[int, str]] = set()
    for piece in model.slices:
        key = (id(piece.structure), piece.kind)
        faults = [] if key in checked else list(_structure_faults(piece))
        checked.add(key)
        faults += _weight_faults(piece, config)
        if faults:
            raise _invalid(piece.label, faults)


def _invalid(label: str, faults: list[str]) -> BudgetError:
    return BudgetError(
        "canonical.invalid",
        f"{label} is not canonical: {'; '.join(faults)}",
        "a pass left something that no target knows; report it with config.json and the recipe",
    )


def _order_faults(model: CanonicalModel, config: ModelConfig) -> Iterator[str]:
    kinds = [piece.kind for piece in model.slices]
    expected = ["embedding", *["layer"] * config.num_layers, "head"]
    if kinds != expected:
        yield f"{kinds.count('layer')} layers among {len(kinds)} slices, expected {config.num_layers} between ends"
    indices = [layer.index for layer in model.layers]
    if indices != list(range(config.num_layers)):
        yield f"layers are numbered {indices}"
    if (model.embedding.index, model.head.index) != (None, None):
        yield "embedding or head carries a layer number"


def _structure_faults(piece: Slice) -> Iterator[str]:
    graph = piece.structure.graph
    if dict(graph.opset_imports) != {"": OPSET}:
        yield f"opset is {dict(graph.opset_imports)}, not {OPSET}"
    for node in graph:
        if node.domain or node.op_type not in OPERATORS:
            yield f"operator {node.domain or 'ai.onnx'}::{node.op_type} at {node.outputs[0].name!r} is not allowed"
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype.name != "INT64" or tensor.size > MAX_CONSTANT_ELEMENTS:
            what = "no value" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
            yield f"initializer {value.name!r} ({what}) is not a small int64 constant"
    yield from _interface_faults(piece)
    yield from _onnx_faults(piece)


def _interface_faults(piece: Slice) -> Iterator[str]:
    """Activations first, in their order and types; outputs in theirs; every other input belongs to a weight."""
    graph = piece.structure.graph
    names, outputs = INTERFACES[piece.kind]
    inputs = [value.name or "" for value in graph.inputs]
    if tuple(inputs[: len(names)]) != names:
        yield f"inputs start with {inputs[: len(names)]}, not with {list(names)}"
    if tuple(value.name for value in graph.outputs) != outputs:
        yield f"outputs are {[value.name for value in graph.outputs]}, not {list(outputs)}"
    for value in [*graph.inputs[: len(names)], *graph.outputs]:
        expected = "INT64" if value.name in INTEGER_INPUTS else "FLOAT"
        if (found := _type_name(value)) != expected:
            yield f"{value.name!r} is {found}, not {expected}"
    if unused := [value.name for value in graph.inputs if not value.uses() and not value.is_graph_output()]:
        yield f"inputs without use: {unused}"


def _type_name(value: "ir.Value") -> str:
    return value.dtype.name if value.dtype is not None else "of no type"


def _onnx_faults(piece: Slice) -> Iterator[str]:
    """What ONNX itself finds wrong: unknown attributes, wrong arity, no topological order."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(piece.structure)
    for output in proto.graph.output:
        # The checker insists on a shape, although outputs follow from the graph; it does not look inside.
        output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        yield f"onnx.checker: {' '.join(str(error).split())}"


def _weight_faults(piece: Slice, config: ModelConfig) -> list[str]:
    """The inputs must be exactly those that `piece.weights` feed, each in its type and shape."""
    inputs = {value.name or "": value for value in piece.structure.graph.inputs}
    shapes = config.tensor_shapes
    unknown = [source for source in _sources(piece) if source not in shapes]
    if unknown:
        return [f"no checkpoint tensor is called {', '.join(unknown)}"]
    expected = {
        name: feed
        for weight_name, weight in piece.weights.items()
        for name, feed in _feeds(weight_name, weight, shapes).items()
    }
    declared = set(expected) | set(INTERFACES[piece.kind][0])
    faults = [f"input {name!r} belongs to no weight" for name in inputs if name not in declared]
    for name, (dtype, shape) in expected.items():
        value = inputs.get(name)
        if value is None:
            faults.append(f"no input {name!r} for a weight")
        elif _type_name(value) != dtype:
            faults.append(f"{name!r} is {_type_name(value)}, not {dtype}")
        elif not _same_shape(value, shape):
            faults.append(f"{name!r} has shape {value.shape}, not {list(shape)}")
        elif fault := _use_fault(piece, value, dtype):
            faults.append(fault)
    return faults


def _feeds(name: str, weight: Weight, shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each graph input that a weight feeds."""
    if isinstance(weight, ScaleValue):
        return {name: ("FLOAT", (1,))}
    if isinstance(weight, RotaryTable):
        return {name: ("FLOAT", (weight.length, len(weight.inverse_frequencies)))}
    shape = _stacked_shape(weight, shapes)
    precision: Precision = weight.precision
    if not precision.is_integer:
        return {name: (FLOAT_TYPES[precision.kind], shape)}
    codes = CODE_TYPES[precision.kind, precision.symmetric]
    groups = (shape[0], shape[-1] // (precision.group_size or 1))
    feeds = {f"{name}.codes": (codes, shape), f"{name}.scales": ("FLOAT", groups)}
    return feeds if precision.symmetric else {**feeds, f"{name}.zero_points": (codes, groups)}


def _sources(piece: Slice) -> list[str]:
    return [
        name for weight in piece.weights.values() if isinstance(weight, CheckpointWeight) for name in weight.sources
    ]


def _stacked_shape(weight: CheckpointWeight, shapes: Shapes) -> tuple[int, ...]:
    parts = [shapes[source] for source in weight.sources]
    return (sum(part[0] for part in parts), *parts[0][1:])


def _same_shape(value: "ir.Value", shape: tuple[int, ...]) -> bool:
    """Equal sizes; a symbolic first size (rows of the vocabulary or of a rotary table) stands for any."""
    found = list(value.shape) if value.shape is not None else []
    return len(found) == len(shape) and all(
        size == want or (axis == 0 and not isinstance(size, int))
        for axis, (size, want) in enumerate(zip(found, shape, strict=True))
    )


def _use_fault(piece: Slice, value: "ir.Value", dtype: str) -> str:
    """Codes, scales and zero points meet in one blocked DequantizeLinear; half precision passes through a Cast."""
    users = {node.op_type for node, _ in value.uses()}
    name = value.name or ""
    if name.endswith((".codes", ".scales", ".zero_points")):
        stem, _, part = name.rpartition(".")
        node = next((node for node, _ in value.uses()), None)
        names = [each.name if each is not None else None for each in node.inputs] if node is not None else []
        triple = [f"{stem}.codes", f"{stem}.scales", f"{stem}.zero_points"][: max(2, len(names))]
        if node is None or users != {"DequantizeLinear"} or len(value.uses()) != 1 or names != triple:
            return f"{part} of {stem!r} do not meet the others in one DequantizeLinear"
        if node.attributes.get_int("axis", 1) != 1 or node.attributes.get_int("block_size", 0) < 1:
            return f"{stem!r} is not dequantized in blocks along axis 1"
        return ""
    if dtype in ("BFLOAT16", "FLOAT16") and users != {"Cast"}:
        return f"{name!r} is {dtype} and must pass through a Cast first"
    return ""
