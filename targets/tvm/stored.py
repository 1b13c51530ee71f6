"""A weight as the weights file holds it: packed for the vector unit, or as a plain float32 array."""

from dataclasses import dataclass, replace

import numpy as np

from exporter.core.canonical import CheckpointWeight, RotaryTable, ScaleValue, Weight
from exporter.core.checkpoint import Checkpoint
from exporter.core.weights import weight_shape
from targets.tvm.isa import Isa
from targets.tvm.packing import Layout, layout


@dataclass(frozen=True)
class StoredWeight:
    """A canonical weight and how it lies in the file. `interleaved`: gate and up rows alternate vector by vector.

    Equal ones are stored once: a tied embedding and head of one precision share their bytes, whatever is asked of the
    head's input.
    """

    name: str
    weight: Weight
    interleaved: bool = False

    @property
    def key(self) -> tuple[Weight, bool]:
        weight = self.weight
        if isinstance(weight, CheckpointWeight):
            weight = replace(weight, precision=weight.precision.weight_only)
        return weight, self.interleaved


def packed_layout(stored: StoredWeight, checkpoint: Checkpoint, isa: Isa) -> Layout | None:
    """How a matrix is packed; None for vectors and rotary tables, which lie as float32 arrays."""
    if not isinstance(stored.weight, CheckpointWeight):
        return None
    shape = weight_shape(checkpoint, stored.weight)
    if len(shape) == 1:
        return None
    return layout(stored.weight.precision, shape[0], shape[1], isa, interleaved=stored.interleaved)


def stored_type(stored: StoredWeight, checkpoint: Checkpoint, isa: Isa) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a stored weight as kernels see it."""
    if (packed := packed_layout(stored, checkpoint, isa)) is not None:
        return np.dtype(packed.dtype).name, tuple(packed.shape)
    if isinstance(stored.weight, CheckpointWeight):
        return "float32", weight_shape(checkpoint, stored.weight)
    return "float32", value_shape(stored.weight)


def value_shape(weight: RotaryTable | ScaleValue) -> tuple[int, ...]:
    """Shape of a weight that is no tensor of the checkpoint."""
    return (1,) if isinstance(weight, ScaleValue) else (weight.length, len(weight.inverse_frequencies))
