"""Reading the rotary tables that a traced graph computes: which frequencies, which scale, which positions."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.passes.editing import constant_of, integers_of, scalar_of


@dataclass(frozen=True)
class Rotation:
    """cos or sin of positions [B, S] times `frequencies` [D / 2], repeated for both halves, times `scale`."""

    positions: ir.Value
    frequencies: tuple[float, ...]
    scale: float


def read_rotation(value: ir.Value, function: str) -> Rotation | str:
    """Follow `Unsqueeze(function(Concat(a, a)) * scale, 1)`, `a = float(positions)[:, :, None] * frequencies`.

    `function` is Cos or Sin. Answers with the reason if the value is computed in another way.
    """
    node = _producer(value, "Unsqueeze")
    if node is None or integers_of(node.inputs[1]) != [1]:
        return "the table is not broadcast over heads by Unsqueeze at axis 1"
    table, scale = _strip_scale(node.inputs[0])
    node = _producer(table, function)
    if node is None:
        return f"the table is not a {function}"
    node = _producer(node.inputs[0], "Concat")
    if node is None or len(node.inputs) != 2 or node.inputs[0] is not node.inputs[1]:
        return "the angles of the two halves are not the same (interleaved rotation?)"
    if node.attributes["axis"].as_int() not in (-1, 2):
        return "the angles are not joined along the last axis"
    return _read_angles(node.inputs[0], scale)


def _read_angles(value: ir.Value | None, scale: float) -> Rotation | str:
    node = _producer(value, "Mul")
    frequencies = constant_of(node.inputs[1]) if node is not None else None
    if node is None or frequencies is None or frequencies.ndim != 1:
        return "the angles are not positions times constant frequencies"
    cast = _producer(node.inputs[0], "Cast")
    unsqueeze = _producer(cast.inputs[0], "Unsqueeze") if cast is not None else None
    if unsqueeze is None or integers_of(unsqueeze.inputs[1]) not in ([2], [-1]):
        return "the positions are not cast and unsqueezed at the last axis"
    positions = unsqueeze.inputs[0]
    if positions is None or positions.name != "position_ids":
        return "the angles do not start from position_ids"
    return Rotation(positions, tuple(float(f) for f in frequencies.astype(np.float32)), scale)


def _strip_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The attention scaling is a multiplication by a constant, or absent."""
    node = _producer(value, "Mul")
    scale = scalar_of(node.inputs[1]) if node is not None else None
    return (value, 1.0) if node is None or scale is None else (node.inputs[0], scale)


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and not node.domain else None
