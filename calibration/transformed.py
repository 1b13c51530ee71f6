"""A checkpoint seen through transforms: the same function, other weights, still read tensor by tensor."""

from collections.abc import Sequence

from calibration.transforms import Transform
from exporter.core.checkpoint import Checkpoint


def with_transforms(checkpoint: Checkpoint, transforms: Sequence[Transform]) -> Checkpoint:
    """The checkpoint with its weights transformed in order; the checkpoint itself when there are no transforms."""
    if not transforms:
        return checkpoint
    raise NotImplementedError
