"""Weights whose codes are looked up in a table (nf4, nvfp4, mxfp4), in the canonical model.

For the weight `w` [N, K] with groups of g, in this order:

    Cast(w.codes UINT4 [N, K], to INT32)
    Gather(table, codes)                 float [N, K]; table: float [16], an initializer
    Reshape(values, [0, -1, g])
    Reshape(w.scales [N, K / g], [0, -1, 1])
    Mul(values, scales)
    Reshape(product, [0, -1])            `w`
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporter.core.number_formats import decode_table

if TYPE_CHECKING:
    # Imported nowhere else here: core must load where the ONNX packages are not installed.
    import onnx_ir as ir

INT32 = 6  # onnx.TensorProto.INT32
TABLES = {"nf4": "nf4", "nvfp4": "e2m1", "mxfp4": "e2m1"}
"""The table of each kind of weight."""


@dataclass(frozen=True)
class TableWeight:
    """A weight restored from a table: the graph inputs it comes from, `nf4` or `e2m1`, its group, all its nodes."""

    codes: "ir.Value"
    scales: "ir.Value"
    table: str
    group: int
    nodes: "tuple[ir.Node, ...]"


def match_table_weight(value: "ir.Value | None") -> TableWeight | None:
    """The weight that ends in `value` [N, K]; None where the steps are not exactly those above."""
    flat = _producer(value, "Reshape", 2)
    product = _producer(flat.inputs[0], "Mul", 2) if flat else None
    values = _producer(product.inputs[0], "Reshape", 2) if product else None
    scales = _producer(product.inputs[1], "Reshape", 2) if product else None
    looked_up = _producer(values.inputs[0], "Gather", 2) if values else None
    cast = _producer(looked_up.inputs[1], "Cast", 1) if looked_up else None
    if not (flat and product and values and scales and looked_up and cast):
        return None
    table, grouped = _table(looked_up.inputs[0]), _integers(values.inputs[1])
    if cast.attributes.get_int("to", 0) != INT32 or looked_up.attributes.get_int("axis", 0) != 0 or not table:
        return None
    if len(grouped) != 3 or grouped[:2] != [0, -1] or grouped[2] < 1:
        return None
    if _integers(scales.inputs[1]) != [0, -1, 1] or _integers(flat.inputs[1]) != [0, -1]:
        return None
    nodes = (cast, looked_up, values, scales, product, flat)
    codes, factors = cast.inputs[0], scales.inputs[0]
    if codes is None or factors is None or any(len(node.outputs[0].uses()) != 1 for node in nodes[:-1]):
        return None
    return TableWeight(codes, factors, table, grouped[2], nodes)


def _producer(value: "ir.Value | None", kind: str, inputs: int) -> "ir.Node | None":
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and len(node.inputs) == inputs else None


def _table(value: "ir.Value | None") -> str:
    """Which table an initializer holds; empty for none."""
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 16:
        return ""
    return next((name for kind, name in TABLES.items() if np.array_equal(tensor.numpy(), decode_table(kind))), "")


def _integers(value: "ir.Value | None") -> list[int]:
    tensor = value.const_value if value is not None else None
    return [] if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
