"""The raw slices of a traced Llama: cutting the whole graph at its layer boundaries, stamping equal layers."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, LiftConstantsToInitializersPass

from exporter.core.canonical import OPSET, CheckpointWeight, Slice, Weight
from exporter.core.config import ModelConfig
from exporter.core.errors import UnsupportedError
from exporter.core.isomorphism import difference
from exporter.core.traced import TracedModel
from exporter.trace.extract import MODULE_PREFIX, Cut, extract
from exporter.trace.opset import convert_opset

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
RAW_LAYER_INPUTS = ("hidden", "position_ids", "attention_mask", "past_key", "past_value")
RAW_LAYER_OUTPUTS = ("hidden_out", "present_key", "present_value")


def cut(whole: ir.Model, config: ModelConfig, layers: int, frequencies: np.ndarray) -> TracedModel:
    """The raw slices of a whole graph with `layers` layers; `frequencies` [D / 2] become an initializer in each.

    Raises UnsupportedError (`trace.boundary`, `trace.weights`) when a slice needs a value from beyond its
    boundary, or other weights than the config promises.
    """
    # Tracers note stack traces, with paths of this machine, on every node and value.
    ClearMetadataAndDocStringPass()(whole)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(whole)
    convert_opset(whole, OPSET)
    cuts = _cuts(whole.graph, layers)
    _bind(whole.graph, layers, frequencies)
    models = [extract(whole, each) for each in cuts]
    slices = [
        Slice("embedding", None, models[0], {}),
        *(Slice("layer", i, model, {}) for i, model in enumerate(models[1:-1])),
        Slice("head", None, models[-1], {}),
    ]
    for piece, each in zip(slices, cuts, strict=True):
        _describe(piece, each.prefix, config)
    return TracedModel(slices[0], slices[1:-1], slices[-1])


def stamp(traced: TracedModel, config: ModelConfig) -> TracedModel:
    """Every layer of the model from the first traced one, sharing its structure.

    Raises UnsupportedError (`trace.layers`) when the traced layers are not alike.
    """
    first = traced.layers[0]
    for other in traced.layers[1:]:
        if why := difference(first.structure, other.structure):
            raise UnsupportedError("trace.layers", f"layer 0 and {other.label} were traced differently: {why}", "")
    layers = []
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        weights: dict[str, Weight] = {name: CheckpointWeight((prefix + name,)) for name in first.weights}
        layers.append(Slice("layer", i, first.structure, weights))
    return TracedModel(traced.embedding, layers, traced.head)


def _cuts(graph: ir.Graph, layers: int) -> list[Cut]:
    """The boundaries, by the order of inputs and outputs of `LlamaWithBoundaries`."""
    ids, positions, mask, _, *rest = graph.inputs
    past = rest[: 2 * layers]
    logits, *hidden = list(graph.outputs)[: layers + 2]
    present = list(graph.outputs)[layers + 2 :]
    cuts = [Cut("embedding", {ids: "input_ids"}, {hidden[0]: "hidden"}, "model.")]
    for i in range(layers):
        own = slice(2 * i, 2 * i + 2)
        inputs = dict(zip((hidden[i], positions, mask, *past[own]), RAW_LAYER_INPUTS, strict=True))
        outputs = dict(zip((hidden[i + 1], *present[own]), RAW_LAYER_OUTPUTS, strict=True))
        # A tracer takes sizes from whichever input it likes: ids are shaped as positions, all caches alike.
        others = {ids: "position_ids"}
        others |= {value: RAW_LAYER_INPUTS[3 + j % 2] for j, value in enumerate(past) if value not in inputs}
        cuts.append(Cut(f"layer {i}", inputs, outputs, f"model.layers.{i}.", others))
    return [*cuts, Cut("head", {hidden[-1]: "hidden"}, {logits: "logits"}, "model.")]


def _bind(graph: ir.Graph, layers: int, frequencies: np.ndarray) -> None:
    """Make the inverse frequencies an initializer with values and every weight an input without."""
    inverse = graph.inputs.pop(3)
    inverse.const_value = ir.tensor(frequencies, name=inverse.name)
    for value in list(graph.initializers.values()):
        if (value.name or "").startswith(MODULE_PREFIX):
            graph.initializers.pop(value.name or "")
            value.const_value = None
            graph.inputs.append(value)
    graph.initializers.add(inverse)


def _describe(piece: Slice, prefix: str, config: ModelConfig) -> None:
    """Types and shapes of the interface, and what feeds the weights; inner shapes in the tracer's symbols go."""
    graph = piece.structure.graph
    graph.name = "slice"
    for node in graph:
        for value in node.outputs:
            value.shape = None
    for value in [*graph.inputs, *graph.outputs]:
        name = value.name or ""
        if (shape := _activation_shape(piece.kind, name, config)) is not None:
            value.shape = ir.Shape(shape)
            value.type = ir.TensorType(INT64 if name in ("input_ids", "position_ids") else FLOAT)
        else:
            source = config.head_source if name == "lm_head.weight" else prefix + name
            piece.weights[name] = CheckpointWeight((source,))
            value.type = ir.TensorType(FLOAT)
    _check_weights(piece, config)


def _activation_shape(kind: str, name: str, config: ModelConfig) -> list[int | str] | None:
    cache: list[int | str] = ["B", config.num_kv_heads, "T" if name.startswith("present") else "P", config.head_dim]
    shapes: dict[str, list[int | str]] = {
        "input_ids": ["B", "S"],
        "position_ids": ["B", "S"],
        "hidden": ["B", "S", config.hidden_size],
        "hidden_out": ["B", "S", config.hidden_size],
        "attention_mask": ["B", 1, "S", "T"],
        "logits": ["B", "S", config.head_size],
        **dict.fromkeys(("past_key", "past_value", "present_key", "present_value"), cache),
    }
    return shapes.get(name)


def _check_weights(piece: Slice, config: ModelConfig) -> None:
    """Each slice must read exactly the tensors that the config promises for it, in their shapes."""
    expected = _expected_weights(piece, config)
    found = {
        weight.sources[0]: tuple(value.shape or ())
        for value in piece.structure.graph.inputs
        if isinstance(weight := piece.weights.get(value.name or ""), CheckpointWeight)
    }
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UnsupportedError(
            "trace.weights",
            f"{piece.label} of the traced graph reads other weights than config.json promises: {', '.join(odd)}",
            "try the other --tracer, or report the config",
        )


def _expected_weights(piece: Slice, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = config.tensor_shapes
    if piece.kind == "layer":
        return {name: shape for name, shape in shapes.items() if name.startswith(f"model.layers.{piece.index}.")}
    if piece.kind == "embedding":
        return {"model.embed_tokens.weight": shapes["model.embed_tokens.weight"]}
    return {name: shapes[name] for name in ("model.norm.weight", config.head_source)}
