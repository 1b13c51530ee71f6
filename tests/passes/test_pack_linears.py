"""Packed projections: one product and a split instead of several products of one value."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.core.canonical import CheckpointWeight, Weight
from exporter.passes.pack_linears import pack_gate_up, pack_qkv
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

QKV = {"self_attn.q_proj": 8, "self_attn.k_proj": 4, "self_attn.v_proj": 4}
GATE_UP = {"mlp.gate_proj": 12, "mlp.up_proj": 12}
K = 6


def linears(widths: dict[str, int], biased: tuple[str, ...] = (), reads: dict[str, str] | None = None) -> ir.Model:
    """A graph of linear layers `name`: reads x, or what `reads` says, gives `name.out`."""
    inputs, nodes = [f"float[2,3,{K}] x, float[2,3,{K}] z"], []
    for name, width in widths.items():
        inputs.append(f"float[{width},{K}] {name.replace('.', '__')}__weight")
        stem = name.replace(".", "__")
        nodes.append(f"{stem}_t = Transpose <perm = [1, 0]> ({stem}__weight)")
        product = f"{stem}_out" if name not in biased else f"{stem}_product"
        nodes.append(f"{product} = MatMul({(reads or {}).get(name, 'x')}, {stem}_t)")
        if name in biased:
            inputs.append(f"float[{width}] {stem}__bias")
            nodes.append(f"{stem}_out = Add({product}, {stem}__bias)")
    outputs = ", ".join(f"float[2,3,{width}] {name.replace('.', '__')}_out" for name, width in widths.items())
    model = parse(f"slice ({', '.join(inputs)}) => ({outputs}) {{ {' '.join(nodes)} }}")
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("__", ".")
    return model


def weights(model: ir.Model) -> dict[str, Weight]:
    names = [value.name or "" for value in model.graph.inputs if value.name not in ("x", "z")]
    return {name: CheckpointWeight((f"model.layers.0.{name}",)) for name in names}


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        value.name or "": normal(i, *[size for size in value.shape or [] if isinstance(size, int)])
        for i, value in enumerate(model.graph.inputs)
    }


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize(
    ("fuse", "widths", "packed"),
    [(pack_qkv, QKV, "self_attn.qkv_proj"), (pack_gate_up, GATE_UP, "mlp.gate_up_proj")],
    ids=["qkv", "gate and up"],
)
def test_packs_and_computes_the_same(fuse, widths: dict[str, int], packed: str, biased: bool) -> None:
    model = linears(widths, tuple(widths) if biased else ())
    given = feeds(model)
    expected = run_ort(model, given)
    part = piece(model, weights=weights(model))
    assert fuse(part, context()).fired == 1
    assert operators(model) == {"Transpose": 1, "MatMul": 1, "Split": 1, **({"Add": 1} if biased else {})}
    kinds = ("weight", "bias") if biased else ("weight",)
    for kind in kinds:
        weight = part.weights[f"{packed}.{kind}"]
        assert isinstance(weight, CheckpointWeight)
        assert weight.sources == tuple(f"model.layers.0.{name}.{kind}" for name in widths)
        given[f"{packed}.{kind}"] = np.concatenate([given[f"{name}.{kind}"] for name in widths])
    assert set(part.weights) == {f"{packed}.{kind}" for kind in kinds}
    assert [value.name for value in model.graph.outputs] == list(expected)
    assert_same(run_ort(model, given), expected)
    assert_same(run_reference(model, given), expected)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: linears(QKV, reads={"self_attn.v_proj": "z"}), "read different values"),
        (lambda: linears({name: width for name, width in QKV.items() if "k_proj" not in name}), "k_proj"),
        (lambda: linears(QKV, biased=("self_attn.q_proj",)), "only some"),
    ],
    ids=["another input", "one missing", "one bias"],
)
def test_leaves_a_near_miss_untouched(model, reason: str) -> None:
    graph = model()
    part = piece(graph, weights=weights(graph))
    before, names = operators(graph), set(part.weights)
    outcome = pack_qkv(part, context())
    assert outcome.fired == 0
    assert operators(graph) == before
    assert set(part.weights) == names
    assert reason in outcome.why_not


def test_leaves_a_weight_that_is_used_twice() -> None:
    model = linears(QKV)
    weight = next(value for value in model.graph.inputs if value.name == "self_attn.k_proj.weight")
    model.graph.append(ir.node("Neg", [weight]))
    outcome = pack_qkv(piece(model, weights=weights(model)), context())
    assert outcome.fired == 0
    assert "k_proj" in outcome.why_not


def test_leaves_a_product_from_the_other_side() -> None:
    model = linears({**QKV, "self_attn.k_proj": 3})
    node = next(n for n in model.graph if n.op_type == "MatMul" and "k_proj" in (n.outputs[0].name or ""))
    first, second = node.inputs
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    assert "another order" in pack_qkv(piece(model, weights=weights(model)), context()).why_not
