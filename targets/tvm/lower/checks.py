"""Checking nodes of the canonical graph before they are taken into a kernel."""

import onnx_ir as ir

from targets.tvm.lower.slice_lowering import SliceLowering


def check_attributes(low: SliceLowering, node: ir.Node, **expected: object) -> None:
    """Every attribute must be one of `expected`, with that value unless it is None (any)."""
    for name, attribute in node.attributes.items():
        value = tuple(attribute.value) if isinstance(attribute.value, list | tuple) else attribute.value
        if name not in expected:
            raise low.refuse(f"{node.op_type} has an attribute {name} = {value}")
        if expected[name] is not None and value != expected[name]:
            raise low.refuse(f"{node.op_type} has {name} = {value}, only {expected[name]} is supported")


def check_inputs(low: SliceLowering, node: ir.Node, count: int) -> None:
    """The first `count` inputs are there and the others are not."""
    given = [value is not None for value in node.inputs]
    if not all(given[:count]) or len(given) < count or any(given[count:]):
        raise low.refuse(f"{node.op_type} has inputs {[value and value.name for value in node.inputs]}")


def constant_integers(value: ir.Value | None) -> tuple[int, ...]:
    """The integers of a small constant; empty for anything else."""
    if value is None or value.const_value is None:
        return ()
    return tuple(int(v) for v in value.const_value.numpy().reshape(-1))


def is_last_axis(axis: int) -> bool:
    """The canonical model's activations are [B, S, features]."""
    return axis in (-1, 2)
