"""From the canonical slices to the programs of VM functions."""

from exporter.core.canonical import CanonicalModel, Slice
from targets.tvm.lower.groups import find_groups
from targets.tvm.lower.operators import lower_node, lower_outputs
from targets.tvm.lower.program import LoweredModel, LoweredSlice
from targets.tvm.lower.slice_lowering import Setting, SliceLowering


def lower(model: CanonicalModel, setting: Setting) -> LoweredModel:
    """Every slice as a program. Raises UnsupportedError (`tvm.lowering`) naming what kernels have no place for."""
    layers = tuple(lower_slice(part, setting) for part in model.layers)
    return LoweredModel(lower_slice(model.embedding, setting), layers, lower_slice(model.head, setting))


def lower_slice(part: Slice, setting: Setting) -> LoweredSlice:
    """One slice; nodes are taken in the graph's order, and written when something needs their values."""
    low = SliceLowering(part, setting)
    groups = find_groups(part.structure.graph)
    for node in part.structure.graph:
        group = groups.get(node)
        if group is None:
            lower_node(low, node)
        elif node is group.nodes[-1]:
            low.values[node.outputs[0]] = group.lower(low)
    lower_outputs(low)
    result = low.parameters["logits" if part.kind == "head" else "hidden"]
    return low.finished(result)
