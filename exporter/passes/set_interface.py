"""The canonical interface: inputs in their order, weights by first use, nothing unused, no stale shapes."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter.core.canonical import EMBEDDING_INPUTS, HEAD_INPUTS, LAYER_INPUTS, OPSET, Slice
from exporter.passes.rule import Context, Outcome

INPUTS = {"embedding": EMBEDDING_INPUTS, "layer": LAYER_INPUTS, "head": HEAD_INPUTS}
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def set_interface(piece: Slice, context: Context) -> Outcome:
    """Order inputs, weights after activations and by first use; drop unused constants; forget inner shapes and notes.

    The vocabulary's size is written V: embedding and head run with any number of rows.
    """
    model = piece.structure
    RemoveUnusedNodesPass()(model)
    graph = model.graph
    by_name = {value.name: value for value in graph.inputs}
    activations = [by_name[name] for name in INPUTS[piece.kind] if name in by_name]
    used = dict.fromkeys(
        value for node in graph for value in node.inputs if value is not None and value.is_graph_input()
    )
    weights = [value for value in used if value not in activations]
    _replace_inputs(graph, [*activations, *weights])
    for value in weights:
        if value.name in VOCABULARY and value.shape is not None:
            value.shape = ir.Shape(["V", *list(value.shape)[1:]])
    for node in graph:
        node.metadata_props.clear()
    for value in [*graph.outputs, *(value for node in graph for value in node.outputs)]:
        value.shape = None
    piece.weights = {value.name: piece.weights[value.name] for value in weights if value.name in piece.weights}
    graph.opset_imports.clear()
    graph.opset_imports[""] = OPSET
    model.ir_version = 11
    return Outcome(1)


def _replace_inputs(graph: ir.Graph, inputs: list[ir.Value]) -> None:
    graph.inputs.clear()
    graph.inputs.extend(inputs)
