"""The canonical model's grammar, checked between stages: operators, interface, weights, order of slices."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.core.canonical import INTERFACES, OPSET, CanonicalModel, Slice
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.core.weight_checks import type_name, unrounded_weights, weight_faults

if TYPE_CHECKING:
    # Imported lazily below: core must load where the ONNX packages are not installed.
    pass

OPERATORS = frozenset(
    [
        *("Gather", "MatMul", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Attention", "Swish"),
        *("Mul", "Add", "Slice", "ReduceMax", "Reshape", "Transpose", "Split", "Cast", "DequantizeLinear"),
        *("Concat", "QuantizeLinear", "Abs", "Div", "Max"),
    ]
)
INTEGER_INPUTS = ("input_ids", "position_ids", "write_indices", "nonpad_kv_seqlen", "rows")
CONSTANT_TYPES = ("INT64", "FLOAT")
# Shapes, widths, bounds and tables of levels: a handful of numbers, never a weight.
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
        faults += weight_faults(piece, config)
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
        if tensor is None or tensor.dtype.name not in CONSTANT_TYPES or tensor.size > MAX_CONSTANT_ELEMENTS:
            what = "no value" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
            yield f"initializer {value.name!r} ({what}) is not a small constant"
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
        if (found := type_name(value)) != expected:
            yield f"{value.name!r} is {found}, not {expected}"
    idle = {f"{name}.input_scale" for name in unrounded_weights(piece)}
    if unused := [v.name for v in graph.inputs if not (v.uses() or v.is_graph_output() or v.name in idle)]:
        yield f"inputs without use: {unused}"


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
