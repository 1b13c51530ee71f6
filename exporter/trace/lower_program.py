"""Bringing an exported program to the operators that torch's ONNX exporter translates, in one cheap walk."""

import torch
from torch.fx import Node

ATEN = torch.ops.aten
# What a traced Llama consists of once the rest is lowered; torchlib translates each of these directly.
TRANSLATED = frozenset(
    [
        *(ATEN._to_copy.default, ATEN.add.Tensor, ATEN.cat.default, ATEN.cos.default, ATEN.embedding.default),
        *(ATEN.expand.default, ATEN.linear.default, ATEN.matmul.default, ATEN.mean.dim, ATEN.mul.Tensor),
        *(ATEN.neg.default, ATEN.pow.Tensor_Scalar, ATEN.reshape.default, ATEN.rsqrt.default, ATEN.silu.default),
        *(ATEN.sin.default, ATEN.slice.Tensor, ATEN.softmax.int, ATEN.sym_size.int, ATEN.transpose.int),
        *(ATEN.unsqueeze.default, ATEN.view.default),
    ]
)
IN_PLACE_OF_INPUT = (ATEN.to.device, ATEN.contiguous.default)


def lower_program(program: torch.export.ExportedProgram) -> bool:
    """Lower the few composite operators of a Llama by hand; tell whether that was all there was to lower.

    If so, the exporter's own decomposition, which traces the whole program twice more with symbolic sizes (more than
    half of the time of tracing), is left out. If not, the program keeps it and is translated all the same.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        _lower(graph, node)
    graph.lint()
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    lowered = all(target in TRANSLATED or not isinstance(target, torch._ops.OpOverload) for target in targets)
    if lowered:
        program.run_decompositions = lambda *_, **__: program
    return lowered


def _lower(graph: torch.fx.Graph, node: Node) -> None:
    if node.target is ATEN._assert_tensor_metadata.default:
        graph.erase_node(node)
    elif node.target in IN_PLACE_OF_INPUT or _is_idle_dropout(node):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    elif node.target is ATEN.to.dtype:
        node.target, node.kwargs, node.args = ATEN._to_copy.default, {"dtype": node.args[1]}, node.args[:1]


def _is_idle_dropout(node: Node) -> bool:
    return node.target is ATEN.dropout.default and node.args[2] is False
