"""A weight as the weights file holds it: packed for the vector unit, or as a plain float32 array."""

from dataclasses import dataclass

import numpy as np

from exporter.core.canonical import CheckpointWeight, RotaryTable, Weight
from exporter.core.checkpoint import Checkpoint
from exporter.core.weights import weight_shape
from targets.tvm.isa import Isa
from targets.tvm.packing import Layout, layout


@dataclass(frozen=True)
class StoredWeight:
    """A canonical weight and how it lies in the file. `interleaved`: gate and up rows alternate vector by vector.

    Equal ones are stored once: a tied embedding and head of one precision share their bytes.
    """

    name: str
    weight: Weight
    interleaved: bool = False

    @property
    def key(self) -> tuple[Weight, bool]:
        return self.weight, self.interleaved


def packed_layout(stored: StoredWeight, checkpoint: Checkpoint, isa: Isa) -> Layout | None:
    """How a matrix is packed; None for vectors and rotary tables, which lie as float32 arrays."""
    if isinstance(stored.weight, RotaryTable):
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
    return "float32", (stored.weight.length, len(stored.weight.inverse_frequencies))
