"""Faults planted in one layer of a canonical model, one for each kind of fusion."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CanonicalModel, CheckpointWeight, RotaryTable, Slice


@dataclass(frozen=True)
class Fault:
    """`plant` damages a private copy of a layer; `operators` are the names that a report may give for it."""

    plant: Callable[[Slice], None]
    operators: tuple[str, ...]


def plant(model: CanonicalModel, layer: int, fault: Fault) -> CanonicalModel:
    """The model with a fault in one layer; all others keep their shared structure."""
    sound = model.layers[layer]
    damaged = Slice(sound.kind, sound.index, sound.structure.clone(), dict(sound.weights))
    fault.plant(damaged)
    layers = [*model.layers[:layer], damaged, *model.layers[layer + 1 :]]
    return CanonicalModel(model.embedding, layers, model.head)


def _nodes(piece: Slice, kind: str) -> list[ir.Node]:
    return [node for node in piece.structure.graph if node.op_type == kind]


def _attribute(kind: str, name: str, value: Callable[[float], float]) -> Callable[[Slice], None]:
    def change(piece: Slice) -> None:
        node = _nodes(piece, kind)[0]
        old = node.attributes[name].value if name in node.attributes else 0
        new = value(old)
        make = ir.AttrInt64 if isinstance(new, int) else ir.AttrFloat32
        node.attributes[name] = make(name, new)

    return change


def _wrong_table(piece: Slice) -> None:
    table = piece.weights["rotary.cos_cache"]
    assert isinstance(table, RotaryTable)
    stretched = tuple(f * 1.001 for f in table.inverse_frequencies)
    piece.weights["rotary.cos_cache"] = replace(table, inverse_frequencies=stretched)


def _write_at_zero(piece: Slice) -> None:
    """The key is always written at position 0 of its row."""
    node = _nodes(piece, "TensorScatter")[0]
    write = node.inputs[2]
    zero = ir.node("Sub", [write, write])
    piece.structure.graph.insert_before(node, zero)
    node.replace_input_with(2, zero.outputs[0])


def _replace_activation(kind: str) -> Callable[[Slice], None]:
    def change(piece: Slice) -> None:
        old = _nodes(piece, "Swish")[0]
        new = ir.node(kind, [old.inputs[0]])
        _take_over(piece, old, new)

    return change


def _take_over(piece: Slice, old: ir.Node, new: ir.Node) -> None:
    name = old.outputs[0].name
    old.outputs[0].name = f"{name}/old"
    new.outputs[0].name = name
    new.outputs[0].type = old.outputs[0].type
    piece.structure.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    piece.structure.graph.remove(old, safe=True)


def _swap_widths(piece: Slice) -> None:
    """The packed projection is cut as if value came first."""
    split = next(node for node in _nodes(piece, "Split") if len(node.outputs) == 3)
    widths = split.inputs[1]
    assert widths is not None and widths.const_value is not None
    wrong = ir.tensor(widths.const_value.numpy()[::-1].astype(np.int64).copy(), name="wrong_widths")
    value = ir.Value(name="wrong_widths", const_value=wrong, shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64))
    piece.structure.graph.initializers.add(value)
    split.replace_input_with(1, value)


def _swap_weights(piece: Slice) -> None:
    """Up stands where gate should."""
    weight = piece.weights["mlp.gate_up_proj.weight"]
    assert isinstance(weight, CheckpointWeight)
    piece.weights["mlp.gate_up_proj.weight"] = replace(weight, sources=weight.sources[::-1])


def _swap_outputs(piece: Slice) -> None:
    """Gate and up are taken from each other's half of the split."""
    split = next(node for node in _nodes(piece, "Split") if len(node.outputs) == 2)
    gate, up = split.outputs
    gate.name, up.name = f"{gate.name}/x", gate.name
    swish, product = _nodes(piece, "Swish")[0], _nodes(piece, "Mul")[-1]
    swish.replace_input_with(0, up)
    product.replace_input_with(next(i for i, v in enumerate(product.inputs) if v is up), gate)


def _drop_residual(piece: Slice) -> None:
    """The attention block's residual is forgotten."""
    add = next(n for n in _nodes(piece, "Add") if any(v is not None and v.name == "hidden" for v in n.inputs))
    branch = next(v for v in add.inputs if v is not None and v.name != "hidden")
    _take_over(piece, add, ir.node("Identity", [branch]))


def _wrong_source(piece: Slice) -> None:
    """The output projection of another layer."""
    weight = piece.weights["self_attn.o_proj.weight"]
    assert isinstance(weight, CheckpointWeight)
    piece.weights["self_attn.o_proj.weight"] = replace(weight, sources=("model.layers.0.self_attn.o_proj.weight",))


FAULTS = {
    "rms_norm_epsilon": Fault(_attribute("RMSNormalization", "epsilon", lambda e: e * 10), ("RMSNormalization",)),
    "rotary_interleaved": Fault(_attribute("RotaryEmbedding", "interleaved", lambda _: 1), ("RotaryEmbedding",)),
    "rotary_table": Fault(_wrong_table, ("RotaryEmbedding",)),
    "attention_scale": Fault(_attribute("Attention", "scale", lambda s: s * 1.01), ("Attention",)),
    "attention_not_causal": Fault(_attribute("Attention", "is_causal", lambda _: 0), ("Attention",)),
    "scatter_axis": Fault(_attribute("TensorScatter", "axis", lambda _: 1), ("TensorScatter",)),
    "scatter_index": Fault(_write_at_zero, ("TensorScatter",)),
    "swish_is_relu": Fault(_replace_activation("Relu"), ("Relu",)),
    "swish_is_sigmoid": Fault(_replace_activation("Sigmoid"), ("Sigmoid",)),
    "qkv_split_widths": Fault(_swap_widths, ("Split",)),
    "gate_up_weights_swapped": Fault(_swap_weights, ("MatMul", "Split")),
    "gate_up_outputs_swapped": Fault(_swap_outputs, ("Split", "MatMul", "Swish", "Mul")),
    "residual_dropped": Fault(_drop_residual, ("Identity",)),
    "wrong_weight_source": Fault(_wrong_source, ("MatMul",)),
}
