"""Activations as an engine with integer arithmetic sees them: int8 codes, a scale for each group of a token."""

from typing import TYPE_CHECKING

from targets.base import ActivationRounding

if TYPE_CHECKING:
    import torch

LARGEST = 127
LEAST_EXPONENT = -24
LEAST_ROW = 2.0**-80


def round_activations(x: "torch.Tensor", group: int, how: ActivationRounding) -> "torch.Tensor":
    """x [.., K] rounded to int8 codes and back, float32, for groups of `group` values along K. Half goes to even.

    `group`: scale max|x| / 127 of each group, as ONNX Runtime's MatMulNBits does it to its first input at
    accuracy_level 4 (MLAS `SQNBIT_CompInt8`). Groups of zeros stay zero.
    `shared-exponent`: scale base * 2^e, with base = max|x| / 127 of the row and e = ceil(log2(max|x| of the group /
    max|x| of the row)) from -24 to 0, as the kernels of target tvm do it before int4 matrices. Rows of zeros stay
    zero, and rows below 2^-80 become it.
    """
    import torch

    groups = x.reshape(*x.shape[:-1], -1, group)
    largest = groups.abs().amax(-1, keepdim=True)
    if how == "group":
        scale = largest / LARGEST
        inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    else:
        scale, inverse = _shared_exponent(largest)
    return (torch.round(groups * inverse) * scale).reshape(x.shape)


def _shared_exponent(largest: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """max|x| of each group [.., G, 1] -> scale, 1 / scale."""
    import torch

    top = largest.amax(-2, keepdim=True)
    zero, base = top < LEAST_ROW, top / LARGEST
    # Adding all but the last unit of the fraction carries into the exponent unless the ratio is a power of two.
    ratio = (largest * torch.where(zero, 0.0, 1.0 / top)).contiguous().view(torch.int32)
    exponent = (((ratio + 0x7FFFFF) >> 23) - 127).clamp(LEAST_EXPONENT, 0)
    power, inverse_power = (((127 + sign * exponent) << 23).view(torch.float32) for sign in (1, -1))
    return torch.where(zero, 0.0, base) * power, torch.where(zero, 0.0, 1.0 / base) * inverse_power
