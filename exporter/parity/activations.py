"""Activations as an engine that rounds them sees them: int8 or E4M3 codes, a scale for a group, a token, or all."""

from typing import TYPE_CHECKING

from exporter.core.recipe import Precision
from targets.base import ActivationRounding

if TYPE_CHECKING:
    import torch

LARGEST = 127
E4M3_LARGEST = 448
LEAST_EXPONENT = -24
LEAST_ROW = 2.0**-80

ASKED: dict[str, ActivationRounding] = {
    "int8/token": "token",
    "int8/tensor": "tensor",
    "fp8/token": "fp8-token",
    "fp8/tensor": "fp8-tensor",
}
"""How the quantized canonical model rounds what a recipe asks for."""


def asked_rounding(precision: Precision) -> ActivationRounding | None:
    """What a recipe asks of a matrix's input, as its graphs compute it."""
    return ASKED.get(precision.activations)


def round_activations(
    x: "torch.Tensor", group: int, how: ActivationRounding, scale: float | None = None
) -> "torch.Tensor":
    """x [.., K] rounded to codes and back, float32. Half goes to even.

    `group`: int8, scale max|x| / 127 of each group of `group` values along K, as ONNX Runtime's MatMulNBits does it to
    its first input at accuracy_level 4 (MLAS `SQNBIT_CompInt8`). Groups of zeros stay zero.
    `shared-exponent`: scale base * 2^e, with base = max|x| / 127 of the row and e = ceil(log2(max|x| of the group /
    max|x| of the row)) from -24 to 0, as the kernels of target tvm do it before int4 matrices. Rows of zeros stay
    zero, and rows below 2^-80 become it.
    `token`, `fp8-token`: scale max|x| / 127 or max|x| / 448 of each row; rows of zeros stay zero.
    `tensor`, `fp8-tensor`: `scale`, from calibration; codes saturate at -128 and 127, or at 448 either way.
    """
    if how in ("group", "shared-exponent"):
        return _round_groups(x, group, how)
    static = how in ("tensor", "fp8-tensor")
    if static and scale is None:
        raise ValueError(f"rounding {how!r} needs a scale from calibration")
    codes = _e4m3 if how.startswith("fp8") else _int8
    if static:
        step = x.new_tensor(scale)
    else:
        largest = x.abs().amax(-1, keepdim=True)
        step = largest / (E4M3_LARGEST if how == "fp8-token" else LARGEST)
        step = step.where(step > 0, step.new_ones(()))
    return codes(x / step) * step


def _int8(x: "torch.Tensor") -> "torch.Tensor":
    return x.round().clamp(-LARGEST - 1, LARGEST)


def _e4m3(x: "torch.Tensor") -> "torch.Tensor":
    """The nearest value of E4M3, saturating (OCP OFP8 1.0): torch alone would turn what is too large into NaN."""
    import torch

    return x.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).to(torch.float32)


def _round_groups(x: "torch.Tensor", group: int, how: ActivationRounding) -> "torch.Tensor":
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
