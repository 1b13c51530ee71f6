"""Linear layers that read one input become a single one, split afterwards."""

from dataclasses import dataclass

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, Slice
from exporter.passes.editing import add_constant, add_input, find_input, new_node, take_over
from exporter.passes.rule import Context, Outcome


@dataclass(frozen=True)
class Linear:
    """x [.., K] times the transpose of `weight` [N, K], plus `bias` [N] if there is one, giving `output`."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def shape(self) -> tuple[int, int]:
        assert self.weight.shape is not None
        n, k = self.weight.shape
        assert isinstance(n, int) and isinstance(k, int)
        return n, k


def pack_qkv(piece: Slice, context: Context) -> Outcome:
    """Query, key and value projections become self_attn.qkv_proj [(H + 2 Hkv) D, hidden] and a Split."""
    return pack(piece, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj")


def pack_gate_up(piece: Slice, context: Context) -> Outcome:
    """Gate and up projections become mlp.gate_up_proj [2 intermediate, hidden] and a Split."""
    return pack(piece, ("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj")


def pack(piece: Slice, parts: tuple[str, ...], packed: str) -> Outcome:
    """Pack the linear layers `parts` into `packed`, stacked in that order along the outputs.

    Does not fire when one is missing, when they read different values, when only some have a bias, or when a
    weight or an unfinished product is used elsewhere.
    """
    graph = piece.structure.graph
    found = [_find(graph, name) for name in parts]
    if why := next((linear for linear in found if isinstance(linear, str)), ""):
        return Outcome(0, why)
    linears = [linear for linear in found if not isinstance(linear, str)]
    if any(linear.x is not linears[0].x for linear in linears):
        return Outcome(0, f"{', '.join(parts)} read different values")
    if len({linear.bias is None for linear in linears}) > 1:
        return Outcome(0, f"only some of {', '.join(parts)} have a bias")
    _replace(graph, linears, packed)
    for kind in ("weight", "bias") if linears[0].bias is not None else ("weight",):
        weights = [piece.weights.pop(f"{part}.{kind}") for part in parts]
        sources = [source for weight in weights if isinstance(weight, CheckpointWeight) for source in weight.sources]
        piece.weights[f"{packed}.{kind}"] = CheckpointWeight(tuple(sources))
    return Outcome(1)


def _find(graph: ir.Graph, name: str) -> Linear | str:
    """The linear layer of a weight's name, or why there is none."""
    weight, bias = find_input(graph, f"{name}.weight"), find_input(graph, f"{name}.bias")
    transpose = _only_user(weight, "Transpose")
    product = _only_user(transpose.outputs[0], "MatMul") if transpose is not None else None
    if weight is None or transpose is None or product is None:
        return f"{name} is not one MatMul with a transposed weight"
    if tuple(transpose.attributes["perm"].as_ints()) != (1, 0) or product.inputs[1] is not transpose.outputs[0]:
        return f"{name} multiplies in another order"
    x, output = product.inputs[0], product.outputs[0]
    nodes: tuple[ir.Node, ...] = (transpose, product)
    assert x is not None
    if bias is not None:
        add = _only_user(output, "Add")
        if add is None or bias not in add.inputs or len(bias.uses()) != 1:
            return f"{name} does not add its bias once"
        nodes, output = (*nodes, add), add.outputs[0]
    return Linear(x, weight, bias, output, nodes)


def _only_user(value: ir.Value | None, kind: str) -> ir.Node | None:
    users = [node for node, _ in value.uses()] if value is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == kind else None


def _replace(graph: ir.Graph, linears: list[Linear], packed: str) -> None:
    widths = [linear.shape[0] for linear in linears]
    weight = add_input(graph, f"{packed}.weight", [sum(widths), linears[0].shape[1]])
    transpose = new_node("Transpose", [weight], [f"{packed}.transposed"], {"perm": [1, 0]})
    nodes = [transpose, new_node("MatMul", [linears[0].x, transpose.outputs[0]], [f"{packed}.product"])]
    if linears[0].bias is not None:
        bias = add_input(graph, f"{packed}.bias", [sum(widths)])
        nodes.append(new_node("Add", [nodes[-1].outputs[0], bias], [f"{packed}.sum"]))
    bounds = add_constant(graph, f"{packed}_widths", widths)
    parts = [linear.output.name or "" for linear in linears]
    split = new_node("Split", [nodes[-1].outputs[0], bounds], parts, {"axis": -1})
    order = {node: i for i, node in enumerate(graph)}
    first = min(
        (node for linear in linears for node in linear.nodes if node.op_type == "MatMul"), key=order.__getitem__
    )
    graph.insert_before(first, [*nodes, split])
    for linear, part in zip(linears, split.outputs, strict=True):
        take_over(part, linear.output)
    for linear in linears:
        graph.remove(reversed(linear.nodes), safe=True)
        for value in (linear.weight, linear.bias):
            if value is not None:
                graph.inputs.remove(value)
