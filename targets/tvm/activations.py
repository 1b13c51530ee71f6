"""Which scales the int8 codes of activations get in front of an integer matrix; kernels and parity ask here."""

from exporter.core.recipe import Precision
from targets.base import ActivationRounding


def shared_exponent(precision: Precision) -> bool:
    """Whether the groups of a token differ in a power of two alone: int4 matrices, whatever their groups.

    Their scale is then applied by an integer addition, which takes no turn of the byte products. int8 matrices keep a
    scale of their own for each group: they are chosen where exactness matters more.
    """
    return precision.kind == "int4"


def activation_rounding(precision: Precision) -> ActivationRounding | None:
    """How activations are rounded before a matrix of this precision; None for float ones."""
    if not precision.is_integer:
        return None
    return "shared-exponent" if shared_exponent(precision) else "group"
