"""How activations are rounded in front of a matrix; kernels and parity ask here."""

from exporter.core.recipe import Precision
from targets.base import ActivationRounding
from targets.tvm.formats import multiplies_integers


def activation_rounding(precision: Precision) -> ActivationRounding | None:
    """How activations are rounded before a matrix of this precision; None for float ones.

    A recipe that asks for rounded activations gets one scale for each token, computed as it comes; this is no coarser
    than one scale from calibration for all of them. Where it asks for none, integer products round all the same:
    before 4-bit codes the groups of a token differ in a power of two alone, which is applied by an integer addition
    and takes no turn of the byte products; int6 and int8 matrices keep a scale of their own for each group, being
    chosen where exactness matters more.
    """
    if precision.kind == "fp8":
        return "fp8-token" if precision.activations else None
    if not multiplies_integers(precision):
        return None
    if precision.activations:
        return "token"
    return "shared-exponent" if precision.bits == 4 else "group"


def has_base(rounding: ActivationRounding | None) -> bool:
    """Whether the scales of a token's groups are one base for the token times powers of two."""
    return rounding in ("shared-exponent", "token")
