"""Activations as an engine that rounds them sees them: int8, E4M3 or E2M1 codes, scales of groups, tokens, or all."""

from typing import TYPE_CHECKING

from exporter.core.recipe import Precision
from targets.base import ASKED_ROUNDINGS, ActivationRounding

if TYPE_CHECKING:
    import torch

LARGEST = 127
E4M3_LARGEST = 448
E2M1_LARGEST = 6
NVFP4_BLOCK = 16
LEAST_EXPONENT = -24
LEAST_ROW = 2.0**-80

ASKED = {asked: how for asked, how in ASKED_ROUNDINGS.items() if how != "nvfp4"}
"""How the quantized canonical model rounds what a recipe asks for. nvfp4/tensor is missing: no CPU runtime has FP4, so
the graph carries its scale and leaves the input alone; only engines that round so, and their simulations, do it."""


def asked_rounding(precision: Precision) -> ActivationRounding | None:
    """What a recipe asks of a matrix's input, as its graphs compute it; None where they leave it alone."""
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
    `nvfp4`: each block of 16 to E2M1 with the scale E4M3(max|x| of the block / 6 / `scale`) * `scale`, as NVFP4 is
    defined; `scale`, amax / (6 * 448), is from calibration, and what lies beyond its amax saturates. A block whose own
    scale rounds to zero (max|x| below amax / 458752) becomes zero.
    """
    if how in ("group", "shared-exponent"):
        return _round_groups(x, group, how)
    static = how in ("tensor", "fp8-tensor")
    if scale is None and (static or how == "nvfp4"):
        raise ValueError(f"rounding {how!r} needs a scale from calibration")
    if how == "nvfp4":
        return _round_nvfp4(x, x.new_tensor(scale))
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


def _round_nvfp4(x: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    import torch

    blocks = x.reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    step = _e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_LARGEST / scale) * scale
    codes = torch.where(step > 0, blocks / step, torch.zeros_like(blocks))
    return (_e2m1(codes) * step).reshape(x.shape)


def _e2m1(x: "torch.Tensor") -> "torch.Tensor":
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, saturating: steps of 1/2 below 2, 1 below 4, 2.
    A half goes to an even number of steps, which has the even code."""
    x = x.clamp(-E2M1_LARGEST, E2M1_LARGEST)
    magnitude = x.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + 1.0 * (magnitude >= 4)
    return (x / step).round() * step


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
