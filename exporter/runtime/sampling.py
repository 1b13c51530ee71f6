"""Choosing the next token from logits: greedy, temperature, nucleus (top-p); reproducible from a seed."""

import math
from dataclasses import dataclass

import numpy as np

from exporter.core.errors import EngineSmithError, InputError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy (ties: the smallest id). `top_p` keeps the smallest set of most likely tokens
    whose probability reaches it (Holtzman et al. 2020, section 3.1). `seed` fixes every draw."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError("usage.temperature", f"temperature is {self.temperature}", "give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError("usage.top_p", f"top_p is {self.top_p}", "give a value above 0, up to 1")
        if self.seed < 0:
            raise InputError("usage.seed", f"seed is {self.seed}", "give 0 or more")


class Sampler:
    """Draws for one row of a batch from its own stream, PCG64 seeded with (seed, row): a row's tokens do not
    depend on how many rows run beside it."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([sampling.seed, row])))

    def choose(self, logits: np.ndarray) -> int:
        """One token id from float logits [V]. NaN and infinities raise: the engine is broken."""
        best = int(np.argmax(logits))
        if not math.isfinite(logits[best]):
            raise EngineSmithError(
                "run.not_finite", f"the engine produced the logit {logits[best]}", "verify the engine: it is broken"
            )
        if self._sampling.temperature == 0:
            return best
        probabilities = np.exp((logits.astype(np.float64) - float(logits[best])) / self._sampling.temperature)
        probabilities /= probabilities.sum()
        return self._draw(*nucleus(probabilities, self._sampling.top_p))

    def _draw(self, ids: np.ndarray, probabilities: np.ndarray) -> int:
        cumulative = np.cumsum(probabilities)
        position = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(position), len(ids) - 1)])


def nucleus(probabilities: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities (not renormalized) of the nucleus of [V], most likely first; all of them for 1.0."""
    if top_p >= 1:
        return np.arange(len(probabilities)), probabilities
    # Tokens below (1 - p) / V together weigh less than 1 - p: none is in the nucleus, and few remain to sort.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    kept = probabilities[order]
    count = int(np.searchsorted(np.cumsum(kept), top_p, side="left")) + 1
    return order[:count], kept[:count]
