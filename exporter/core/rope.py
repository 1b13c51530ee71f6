"""Inverse frequencies of rotary position embedding, rounded step by step as transformers computes them in torch.

An ulp matters: at position 100,000 it turns a head's first pairs by 0.01 radian.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from exporter.core.config import RopeConfig


def inverse_frequencies(rope: "RopeConfig", head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2] (transformers, modeling_rope_utils.py, `ROPE_INIT_FUNCTIONS`)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # In float64: torch's float32 power is nearly correctly rounded, numpy's is not.
    powers = np.float64(np.float32(rope.theta)) ** exponents.astype(np.float64)
    plain = np.float32(1) / powers.astype(np.float32)
    if rope.type == "llama3":
        return _llama3(rope, plain)
    return plain / np.float32(rope.factor) if rope.type == "linear" else plain


def _llama3(rope: "RopeConfig", plain: np.ndarray) -> np.ndarray:
    """Low frequencies divided by `factor`, high ones kept, those between blended.

    A number divided by a tensor is, in torch, the tensor's reciprocal times the number.
    """
    length, factor = rope.original_max_position_embeddings, np.float32(rope.factor)
    low, width = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor - rope.low_freq_factor)
    wavelength = np.float32(1) / plain * np.float32(2 * math.pi)
    smooth = (np.float32(1) / wavelength * np.float32(length) - low) / width
    blended = (np.float32(1) - smooth) * plain / factor + smooth * plain
    is_low = wavelength > np.float32(length / rope.low_freq_factor)
    is_high = wavelength < np.float32(length / rope.high_freq_factor)
    return np.where(is_low, plain / factor, np.where(is_high, plain, blended)).astype(np.float32)
