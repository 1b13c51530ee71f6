"""Nodes of the canonical graph that say one thing together: weights out of a table, and rounded inputs of matrices."""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from exporter.core.rounded_input import RoundedInput, match_rounded_input
from exporter.core.table_weight import TABLES, TableWeight, match_table_weight
from targets.tvm.lower.slice_lowering import SliceLowering
from targets.tvm.lower.values import Lowered, Rounded, WeightRef


@dataclass(frozen=True)
class Group:
    """Nodes in order; `lower` gives what the output of the last one stands for."""

    nodes: tuple[ir.Node, ...]
    lower: Callable[[SliceLowering], Lowered]


def find_groups(graph: ir.Graph) -> dict[ir.Node, Group]:
    """The group that each node belongs to; nodes that stand for themselves are left out."""
    groups = [group for node in graph if (group := _ending_in(node)) is not None]
    return {node: group for group in groups for node in group.nodes}


def _ending_in(node: ir.Node) -> Group | None:
    if (weight := match_table_weight(node.outputs[0])) is not None:
        return Group(weight.nodes, lambda low: _table_weight(low, weight))
    if (rounded := match_rounded_input(node.outputs[0])) is not None:
        return Group(rounded.nodes, lambda low: _rounded_input(low, rounded))
    return None


def _table_weight(low: SliceLowering, found: TableWeight) -> WeightRef:
    """codes and scales of one weight become that weight again."""
    codes, scales = low.lowered(found.codes), low.lowered(found.scales)
    if not isinstance(codes, WeightRef) or not isinstance(scales, WeightRef):
        raise low.refuse(f"a table of {found.table} is read by {found.codes.name}")
    if (codes.part, scales.part) != ("codes", "scales") or codes.name != scales.name:
        raise low.refuse(f"{codes.name} is multiplied with {scales.part} of another weight, {scales.name}")
    precision = getattr(codes.weight, "precision", None)
    stored = (TABLES.get(precision.kind), precision.group_size) if precision else None
    if stored != (found.table, found.group):
        raise low.refuse(f"{codes.name} is looked up in {found.table} in groups of {found.group}, stored as {stored}")
    return WeightRef(codes.name, codes.weight)


def _rounded_input(low: SliceLowering, found: RoundedInput) -> Rounded:
    source = low.lowered(found.source)
    if source is None:
        raise low.refuse(f"{found.source.name} is rounded to {found.activations}")
    return Rounded(source, found.activations)
