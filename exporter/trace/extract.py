"""Taking one slice out of a whole graph: a subgraph between boundary values, with an interface of its own."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter.core.errors import UnsupportedError

# What the traced module calls the model inside it; weights are named after it.
MODULE_PREFIX = "model."


@dataclass(frozen=True)
class Cut:
    """Where to cut and what to call the ends.

    `inputs` and `outputs` map values of the whole graph to names of the slice; `prefix` is taken off the
    checkpoint names of weights. `stand_ins` maps inputs of the whole graph that the slice may ask for their
    shape, and for nothing else, to the slice's input that answers instead.
    """

    label: str
    inputs: dict[ir.Value, str]
    outputs: dict[ir.Value, str]
    prefix: str
    stand_ins: dict[ir.Value, str] = field(default_factory=dict)


def extract(whole: ir.Model, cut: Cut) -> ir.Model:
    """A copy of the part between the boundaries; weights are inputs named relative to the slice.

    Raises UnsupportedError (`trace.boundary`) when the part needs a value from beyond its boundary.
    """
    weights = [value for value in whole.graph.inputs if (value.name or "").startswith(MODULE_PREFIX)]
    try:
        graph = ir.convenience.extract(whole.graph, [*cut.inputs, *cut.stand_ins, *weights], list(cut.outputs))
    except ValueError as error:
        raise _open(cut.label, str(error)) from error
    inputs = list(graph.inputs)
    own, foreign = inputs[: len(cut.inputs)], inputs[len(cut.inputs) : len(cut.inputs) + len(cut.stand_ins)]
    _rename(own, cut.inputs.values())
    _rename(graph.outputs, cut.outputs.values())
    by_name = {value.name: value for value in own}
    for value, answer in zip(foreign, cut.stand_ins.values(), strict=True):
        _answer_shapes(value, by_name[answer], cut.label)
    for value in inputs[len(own) :]:
        if value.uses():
            value.name = (value.name or "").removeprefix(MODULE_PREFIX).removeprefix(cut.prefix)
        else:
            graph.inputs.remove(value)
    model = ir.Model(graph, ir_version=11)
    RemoveUnusedNodesPass()(model)
    return model


def _rename(values: Iterable[ir.Value], names: Iterable[str]) -> None:
    for value, name in zip(values, names, strict=True):
        value.name = name


def _answer_shapes(value: ir.Value, answer: ir.Value, label: str) -> None:
    """Let `answer` take over every question for the shape of `value`; they have equal shapes by the interface."""
    for node, index in tuple(value.uses()):
        if node.op_type != "Shape":
            raise _open(label, f"it reads {value.name!r} in {node.op_type}")
        node.replace_input_with(index, answer)


def _open(label: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        "trace.boundary",
        f"{label} of the traced graph depends on more than its inputs: {why}",
        "try the other --tracer; the installed transformers may compute something across layers",
    )
