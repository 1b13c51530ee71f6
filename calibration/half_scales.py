"""Scales as float16 values, so that targets that store them in two bytes compute with the same weights as others."""

import numpy as np

# Scales in this range are float16 values. Below 2^-14 float16 loses digits; at 2^-17 a scale still errs by less than
# 1/256, so that the largest of 127 steps stays in reach. What is smaller or larger stays float32.
HALF_MIN, HALF_MAX = np.float32(2.0**-17), np.float32(65504)


def as_half(scales: np.ndarray) -> np.ndarray:
    """float32 -> float32, the nearest float16 values where they are in the range of those."""
    size = np.abs(scales)
    half = np.clip(scales, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)
    return np.where((size >= HALF_MIN) & (size <= HALF_MAX), half, scales)
