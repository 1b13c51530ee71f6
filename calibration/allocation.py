"""Which precision each unit of a model gets: least divergence within a budget of bits, or fewest bits within one of KL.

A unit is what must share a precision (the packed q, k, v of a layer, its down projection, the head ...). Divergences
of units are taken to add up, which holds while they are small: KL is quadratic in the error, and errors of different
matrices are nearly uncorrelated. Choosing is then a multiple-choice knapsack, solved by dynamic programming over bits
in CELLS equal parts of the range (Kellerer, Pferschy, Pisinger: Knapsack Problems, 11.5). Each choice is rounded up to
whole parts, so a budget is never exceeded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.core.errors import BudgetError

CELLS = 1 << 14


@dataclass(frozen=True)
class Choice:
    """One precision for a unit, by any name: what it stores and what it costs (mean KL in nats)."""

    name: str
    bits: float
    divergence: float


@dataclass(frozen=True)
class Allocation:
    """The choice for each unit, and the sums over all units."""

    chosen: Mapping[str, Choice]

    @property
    def bits(self) -> float:
        return sum(choice.bits for choice in self.chosen.values())

    @property
    def divergence(self) -> float:
        return sum(choice.divergence for choice in self.chosen.values())


Units = Mapping[str, Sequence[Choice]]


def within_bits(units: Units, budget: float) -> Allocation:
    """Least divergence with at most `budget` bits in all. BudgetError (`auto.size`) if even the smallest take more."""
    smallest = sum(min(choice.bits for choice in choices) for choices in units.values())
    if smallest > budget:
        raise BudgetError(
            "auto.size",
            f"the smallest choices take {smallest / 8e6:.3g} MB, {budget / 8e6:.3g} MB asked",
            "allow more: --target-bits or --target-bytes",
        )
    table = _Table(units, smallest, budget)
    return table.allocation(CELLS)


def within_divergence(units: Units, limit: float) -> Allocation:
    """Fewest bits with a divergence of at most `limit`. BudgetError (`auto.quality`) if even the best diverge more."""
    best = sum(min(choice.divergence for choice in choices) for choices in units.values())
    if best > limit:
        raise BudgetError(
            "auto.quality",
            f"the best choices are expected to diverge by {best:.4g}, {limit:.4g} asked",
            "allow a larger --max-kl, or use int8-weight or bf16",
        )
    smallest, largest = (sum(pick(c.bits for c in choices) for choices in units.values()) for pick in (min, max))
    # Every choice may be rounded up by a part; the range has room for that, or the best would not fit.
    table = _Table(units, smallest, largest + len(units) * (largest - smallest) / (CELLS - len(units)))
    return table.allocation(table.first_within(limit))


class _Table:
    """Least divergence of the first units for each number of parts spent above their smallest choices."""

    def __init__(self, units: Units, smallest: float, budget: float) -> None:
        self._units = units
        self._part = (budget - smallest) / CELLS
        self._picks: list[np.ndarray] = []
        self._least = np.zeros(CELLS + 1)
        for choices in units.values():
            self._add(choices)

    def first_within(self, limit: float) -> int:
        """The fewest parts that keep the limit."""
        # Sums in another order may differ in the last bits.
        found = np.flatnonzero(self._least <= limit * (1 + 1e-12))
        return int(found[0]) if len(found) else CELLS

    def allocation(self, parts: int) -> Allocation:
        """The choices behind an entry, followed back from the last unit."""
        chosen: dict[str, Choice] = {}
        for (unit, choices), picks in zip(reversed(list(self._units.items())), reversed(self._picks), strict=True):
            choice = choices[int(picks[parts])]
            chosen[unit] = choice
            parts -= self._size(choice, choices)
        return Allocation(chosen)

    def _add(self, choices: Sequence[Choice]) -> None:
        options = np.full((len(choices), CELLS + 1), np.inf)
        for index, choice in enumerate(choices):
            size = self._size(choice, choices)
            if size <= CELLS:
                options[index, size:] = self._least[: CELLS + 1 - size] + choice.divergence
        self._picks.append(options.argmin(0).astype(np.int16))
        self._least = options.min(0)

    def _size(self, choice: Choice, choices: Sequence[Choice]) -> int:
        """Parts that a choice takes above the unit's smallest, rounded up."""
        above = choice.bits - min(each.bits for each in choices)
        if above <= 0:
            return 0
        return math.ceil(above / self._part) if above <= self._part * CELLS else CELLS + 1
