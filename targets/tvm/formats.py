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


def scale_bytes(precision: Precision) -> int:
    """Bytes of a scale in a record: float16, or one byte, E4M3 of nvfp4 and E8M0 of mxfp4; floats have none there."""
    if not multiplies_integers(precision):
        return 0
    return 1 if precision.kind in E2M1 else 2


def zero_point_bytes(precision: Precision) -> int:
    """Bytes of a zero point in a record."""
    return 0 if precision.symmetric else 1


def factor_bytes(precision: Precision) -> int:
    """Bytes of a row's own factor at the end of a block."""
    return 4 if precision.kind in ROW_SCALED else 0


def matrix_bits(precision: Precision, rows: int, width: int) -> int:
    """Bits of a matrix [rows, width] in the file: codes, scales, zero points and factors of rows. Rows of zeros that
    fill up the last block (at most twice the lanes of the CPU, less one) and gaps to the next page are not counted.
    A row that no group divides is refused: one scale stands for all."""
    row = width * precision.bits + 8 * factor_bytes(precision)
    if multiplies_integers(precision):
        groups = width // (stored_group(precision, width) or width)
        row += 8 * groups * (scale_bytes(precision) + zero_point_bytes(precision))
    return rows * row
