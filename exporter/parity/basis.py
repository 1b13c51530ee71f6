"""The residual stream of a transformed checkpoint: that of eager, rotated where a transform rotates it."""

from functools import reduce

import numpy as np

from calibration.rotation import Rotation
from calibration.transformed import TransformedCheckpoint
from calibration.transforms import RotateResidual
from exporter.core.checkpoint import Checkpoint
from exporter.parity.track import Basis


def residual_basis(checkpoint: Checkpoint) -> Basis:
    """Eager's hidden states [.., H] as they stand in the transformed model, float32."""
    transforms = checkpoint.transforms if isinstance(checkpoint, TransformedCheckpoint) else ()
    size = checkpoint.config.hidden_size
    rotations = [Rotation(size, each.seed) for each in transforms if isinstance(each, RotateResidual)]

    def turn(hidden: np.ndarray) -> np.ndarray:
        return reduce(lambda states, rotation: rotation.apply(states).astype(np.float32), rotations, hidden)

    return turn
