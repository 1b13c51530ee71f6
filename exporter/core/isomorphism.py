"""Whether two slices are the same graph up to the names of inner values and the order of nodes."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

# Default attribute values that one exporter writes and another leaves out.
DEFAULTS = {
    ("Reshape", "allowzero"): 0,
    ("Shape", "start"): 0,
    ("ReduceMean", "noop_with_empty_axes"): 0,
    ("Gather", "axis"): 0,
}


def difference(first: "ir.Model", second: "ir.Model") -> str | None:
    """What distinguishes two graphs, or None: interface, operators, attributes, wiring, constants.

    Walks both graphs from their outputs side by side, so the answer names the first place where they part.
    """
    return next(_differences(first.graph, second.graph), None)


def _differences(first: "ir.Graph", second: "ir.Graph") -> Iterator[str]:
    for kind in ("inputs", "outputs"):
        mine, theirs = ([_signature(v) for v in getattr(g, kind)] for g in (first, second))
        if mine != theirs:
            yield f"{kind} differ: {mine} and {theirs}"
            return
    if first.opset_imports != second.opset_imports:
        yield f"opsets differ: {first.opset_imports} and {second.opset_imports}"
    yield from _walk(first, second)
    counts = [Counter(node.op_type for node in graph) for graph in (first, second)]
    if counts[0] != counts[1]:
        yield f"operators differ: {dict(counts[0] - counts[1])} only here, {dict(counts[1] - counts[0])} only there"


def _signature(value: "ir.Value") -> tuple[str | None, str, str]:
    return value.name, str(value.dtype), str(value.shape)


def _walk(first: "ir.Graph", second: "ir.Graph") -> Iterator[str]:
    """Pair values from the outputs backwards; a value paired twice must have the same partner."""
    partner: dict[ir.Value, ir.Value] = dict(zip(first.inputs, second.inputs, strict=True))
    reverse = {theirs: mine for mine, theirs in partner.items()}
    stack: list[tuple[ir.Value | None, ir.Value | None]] = list(zip(first.outputs, second.outputs, strict=True))
    while stack:
        mine, theirs = stack.pop()
        if mine is None or theirs is None:
            if mine is not theirs:
                yield f"an optional input is present in one only: {mine} and {theirs}"
            continue
        if _is_constant(mine) or _is_constant(theirs):
            # By content: whether two nodes share a constant or have one each is of no consequence.
            if not _same_constant(mine, theirs):
                yield f"constants {mine.name!r} and {theirs.name!r} differ"
            continue
        if mine in partner or theirs in reverse:
            if partner.get(mine) is not theirs or reverse.get(theirs) is not mine:
                yield f"wiring differs at {mine.name!r} and {theirs.name!r}"
            continue
        partner[mine], reverse[theirs] = theirs, mine
        producers = mine.producer(), theirs.producer()
        if producers[0] is None or producers[1] is None:
            yield f"{mine.name!r} and {theirs.name!r} have different sources"
            continue
        if reason := _node_difference(producers[0], producers[1], mine, theirs):
            yield reason
            continue
        stack.extend(zip(producers[0].inputs, producers[1].inputs, strict=True))


def _node_difference(mine: "ir.Node", theirs: "ir.Node", out: "ir.Value", other: "ir.Value") -> str | None:
    here = f"at {out.name!r} and {other.name!r}"
    if (mine.domain, mine.op_type) != (theirs.domain, theirs.op_type):
        return f"{mine.op_type} against {theirs.op_type} {here}"
    if (out.index(), len(mine.outputs), len(mine.inputs)) != (other.index(), len(theirs.outputs), len(theirs.inputs)):
        return f"{mine.op_type} has other inputs or outputs {here}"
    if (attributes := _attributes(mine)) != (others := _attributes(theirs)):
        return f"{mine.op_type} attributes {attributes} against {others} {here}"
    return None


def _attributes(node: "ir.Node") -> dict[str, object]:
    """Attribute values, floats rounded to the float32 that ONNX stores, defaults left out."""
    values: dict[str, object] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if hasattr(value, "tobytes"):
            value = (value.dtype.name, tuple(value.shape), value.tobytes())
        elif isinstance(value, float):
            value = float(np.float32(value))
        elif isinstance(value, list | tuple):
            value = tuple(value)
        if DEFAULTS.get((node.op_type, name), ...) != value:
            values[name] = value
    return values


def _is_constant(value: "ir.Value") -> bool:
    return value.producer() is None and value.const_value is not None


def _same_constant(mine: "ir.Value", theirs: "ir.Value") -> bool:
    a, b = mine.const_value, theirs.const_value
    if a is None or b is None:
        return False
    return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy()) and tuple(a.shape) == tuple(b.shape)
