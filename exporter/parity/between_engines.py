"""How far engines of one checkpoint part from each other, on the same text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporter.parity.report import finite
from exporter.parity.scoring import compare_logits

COLUMNS = 1 << 14
"""Of the vocabulary, held at once."""


@dataclass
class KeptLogits:
    """An engine's logits on a file, with the positions of the text that they belong to: too large to hold for many."""

    path: Path
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def keep(self, positions: np.ndarray, logits: np.ndarray) -> None:
        """positions [R], logits [R, V]."""
        self.positions = positions
        np.save(self.path, logits)

    def blocks(self, positions: np.ndarray) -> Iterator[np.ndarray]:
        """Logits [r, C] at some of the positions, over the vocabulary."""
        stored, rows = np.load(self.path, mmap_mode="r"), np.searchsorted(self.positions, positions)
        for start in range(0, stored.shape[1], COLUMNS):
            yield stored[:, start : start + COLUMNS][rows]


def divergences(engines: Mapping[str, KeptLogits]) -> Iterator[dict[str, Any]]:
    """For every ordered pair: KL of the second engine from the first, in nats, mean over the positions both have."""
    for name, kept in engines.items():
        for other, others in engines.items():
            if name == other:
                continue
            common = np.intersect1d(kept.positions, others.positions)
            yield {"engine": name, "other": other, "positions": len(common), **_divergence(kept, others, common)}


def _divergence(kept: KeptLogits, other: KeptLogits, positions: np.ndarray) -> dict[str, float | None]:
    """None where the engines have no position in common: their limits are too different."""
    if not len(positions):
        return {"kl_divergence_mean": None, "top1_agreement": None}
    found = compare_logits(kept.blocks(positions), other.blocks(positions), np.full(len(positions), -1))
    return {"kl_divergence_mean": finite(found.kl_divergence_mean), "top1_agreement": finite(found.top1_agreement)}
