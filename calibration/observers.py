"""Observers: from values to the largest magnitude that their codes should reach, by four rules and granularities.

absmax: max|x|, nothing is clipped. percentile: a quantile of |x|. mse: the clip, of a grid, whose rounded values have
the least squared error. entropy: the clip with the least Kullback-Leibler divergence between the histogram of |x| and
that of its rounded values (Migacz, 8-bit inference with TensorRT, GTC 2017). Arrays only; nothing is known of models.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from calibration.float_codecs import decode_e4m3, encode_e4m3, round_e2m1
from exporter.core.errors import InputError
from exporter.core.number_formats import E2M1_MAX

OBSERVERS = ("absmax", "percentile", "mse", "entropy")
TOPS = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6 * 448.0}
"""The largest magnitude that a code stands for, before scaling: symmetric int8, E4M3, and E2M1 times an E4M3 scale."""
NVFP4_BLOCK = 16
MSE_STEPS = np.arange(1, 101) / 100
HISTOGRAM_BINS, LEVELS = 2048, 128


@dataclass(frozen=True)
class Granularity:
    """Which values [T, K] share a clip -> shape of the result.

    `tensor`: all -> [1, 1]; `channel`: a column -> [1, K]; `token`: a row -> [T, 1]; `group`: `size` neighbours of a
    row -> [T, K / size].
    """

    kind: str = "tensor"
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("tensor", "channel", "token", "group"):
            raise InputError("observer.granularity", f"unknown granularity {self.kind!r}", "see docs/calibration.md")
        if self.kind == "group" and self.size < 1:
            raise InputError("observer.granularity", f"groups of {self.size}", "give a size from 1")

    def sets(self, values: np.ndarray) -> np.ndarray:
        """[T, K] -> [R, V]: the values that share a clip, a row each, in the order of the flattened result."""
        if self.kind == "tensor":
            return values.reshape(1, -1)
        if self.kind == "channel":
            return values.T
        return values if self.kind == "token" else values.reshape(-1, self.size)

    def shape(self, values: np.ndarray) -> tuple[int, int]:
        """Of the result for values [T, K]."""
        tokens, width = values.shape
        shapes = {"tensor": (1, 1), "channel": (1, width), "token": (tokens, 1)}
        return shapes[self.kind] if self.kind in shapes else (tokens, width // self.size)


@dataclass(frozen=True)
class Observer:
    """A rule, and the codes it is for: `kind` int8, fp8 or nvfp4 (`mse` rounds to them); `percentile` of its rule.

    nvfp4 stands for one scale of all: its blocks of 16 neighbours must not be torn apart (`channel`)."""

    rule: str = "absmax"
    kind: str = "int8"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.rule not in OBSERVERS:
            raise InputError("recipe.observer", f"unknown observer {self.rule!r}", f"use one of {', '.join(OBSERVERS)}")
        if not 0 < self.percentile <= 100:
            raise InputError("recipe.percentile", f"percentile {self.percentile}", "give more than 0 and at most 100")

    def amax(self, values: np.ndarray, granularity: Granularity | None = None) -> np.ndarray:
        """float32 clips of finite values [T, K], in the shape of the granularity (default: one for all)."""
        granularity = granularity or Granularity()
        sets = np.abs(granularity.sets(np.asarray(values, np.float32)))
        if self.rule == "absmax":
            found = sets.max(axis=1)
        elif self.rule == "percentile":
            found = np.quantile(sets, self.percentile / 100, axis=1)
        else:
            search = _least_error if self.rule == "mse" else _least_divergence
            found = np.array([search(row, self.kind) for row in sets])
        clips: np.ndarray = found.astype(np.float32).reshape(granularity.shape(values))
        return clips


def _least_error(magnitudes: np.ndarray, kind: str) -> float:
    """argmin over clips c = amax * i / 100 of the sum of (x - Q_c(x))^2."""
    amax = float(magnitudes.max())
    if amax == 0:
        return 0.0
    errors = [_squared_error(magnitudes, amax * step, kind) for step in MSE_STEPS]
    # The last of equals: the largest clip.
    best = len(errors) - 1 - int(np.argmin(errors[::-1]))
    return float(amax * MSE_STEPS[best])


def _squared_error(magnitudes: np.ndarray, clip: float, kind: str) -> float:
    scale = np.float32(clip / TOPS[kind])
    if kind == "nvfp4":
        error = _nvfp4(magnitudes, scale) - magnitudes
        return float(np.square(error, dtype=np.float64).sum())
    codes = np.minimum(magnitudes / scale, np.float32(TOPS[kind]))
    rounded = np.rint(codes) if kind == "int8" else codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    error = rounded * scale - magnitudes
    return float(np.square(error, dtype=np.float64).sum())


def _nvfp4(magnitudes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Each block of 16 in E2M1, its E4M3 scale times `scale`; a block whose own scale rounds to zero becomes zero."""
    blocks = magnitudes.reshape(-1, NVFP4_BLOCK)
    steps = decode_e4m3(encode_e4m3(blocks.max(axis=1, keepdims=True) / np.float32(E2M1_MAX) / scale)) * scale
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    return (round_e2m1(blocks * inverse) * steps).reshape(-1)


def _least_divergence(magnitudes: np.ndarray, kind: str) -> float:
    """The threshold of TensorRT's entropy calibration: 2048 bins of |x|, 128 levels, every bin edge from 128 on.

    fp8 and nvfp4 are treated as int8 is: their own levels are dense near zero, where no clip changes them.
    """
    amax = float(magnitudes.max())
    if amax == 0:
        return 0.0
    counts, _ = np.histogram(magnitudes, HISTOGRAM_BINS, (0.0, amax))
    divergences = [divergence(counts, kept) for kept in range(LEVELS, HISTOGRAM_BINS + 1)]
    best = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return amax * (LEVELS + best) / HISTOGRAM_BINS


def divergence(counts: np.ndarray, kept: int) -> float:
    """KL(P, Q): P the first `kept` bins with all beyond in the last of them, Q those bins (without what lies beyond)
    merged into LEVELS levels and spread again over the bins of a level that are not empty."""
    reference = counts[:kept].astype(np.float64)
    level = np.arange(kept) * LEVELS // kept
    filled = reference > 0
    totals = np.bincount(level, reference, LEVELS)
    holders = np.bincount(level, filled, LEVELS)
    spread = np.where(filled, (totals / np.maximum(holders, 1))[level], 0.0)
    reference[-1] += counts[kept:].sum()
    present = reference > 0
    if not spread.sum() or (spread[present] == 0).any():
        return float("inf")
    p, q = reference[present] / reference.sum(), spread[present] / spread.sum()
    return float((p * np.log(p / q)).sum())
