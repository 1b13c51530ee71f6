"""Activations as an engine with integer arithmetic sees them: int8 codes with one scale per block."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def quantize_activations(x: "torch.Tensor", block: int) -> "torch.Tensor":
    """x [.., K] rounded to int8 codes with scale max|x| / 127 for every `block` values along K, as float32.

    What ONNX Runtime's MatMulNBits does to its first input at accuracy_level 4 (MLAS `SQNBIT_CompInt8`): round
    half to even, block length that of the weight. Blocks of zeros stay zero.
    """
    import torch

    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return (torch.round(blocks * inverse) * scale).reshape(x.shape)
