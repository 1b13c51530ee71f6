"""Which form each precision of weights takes in an engine of this target."""

from calibration.coverage import kernel_group
from exporter.core.recipe import CHANNEL, INTEGER_BITS, Precision

TABLED = ("nf4", "nvfp4", "mxfp4")
"""4-bit codes that stand for whole numbers in a table, and are multiplied as those (kernels/levels.py)."""
E2M1 = ("nvfp4", "mxfp4")
ROW_SCALED = ("fp8", "nvfp4")
"""Stored with a float32 factor for each row."""


def multiplies_integers(precision: Precision) -> bool:
    """Whether its matrices are multiplied by int8 activations; others are in float32."""
    return precision.kind in (*INTEGER_BITS, *TABLED)


def float_precision(kind: str) -> Precision:
    """A precision whose matrices lie as values of this kind."""
    return Precision(kind, CHANNEL if kind in ROW_SCALED else None)


def stored_group(precision: Precision, width: int) -> int:
    """Columns of a record: those that share a scale, or where a whole row shares it a part of them; 1 for floats."""
    return kernel_group(precision, width) if multiplies_integers(precision) else 1
