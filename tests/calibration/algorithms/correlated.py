"""Seeded weights and inputs whose channels are correlated and of unequal loudness, as those of models are."""

import numpy as np

from calibration.statistics import InputStatistics


def correlated_inputs(width: int, tokens: int, seed: int = 0) -> np.ndarray:
    """float32 [tokens, width]."""
    random = np.random.default_rng(seed)
    mix = np.eye(width) + 0.5 * random.standard_normal((width, width)) / np.sqrt(width)
    loudness = np.exp(0.7 * random.standard_normal(width))
    return (random.standard_normal((tokens, width)) @ mix * loudness).astype(np.float32)


def weights(rows: int, width: int, seed: int = 1) -> np.ndarray:
    """float32 [rows, width]."""
    return (0.02 * np.random.default_rng(seed).standard_normal((rows, width))).astype(np.float32)


def statistics_of(inputs: np.ndarray) -> InputStatistics:
    """By definition, in float64."""
    wide = inputs.astype(np.float64)
    return InputStatistics(
        len(inputs),
        np.abs(inputs).max(axis=0),
        np.abs(wide).mean(axis=0).astype(np.float32),
        (wide.T @ wide / len(wide)).astype(np.float32),
        inputs,
    )


def hessian_error(changes: np.ndarray, hessian: np.ndarray) -> float:
    """tr(D H DT) in float64."""
    wide = changes.astype(np.float64)
    return float(((wide @ hessian.astype(np.float64)) * wide).sum())
