"""Allocation against every combination there is."""

import itertools

import numpy as np
import pytest

from calibration.allocation import CELLS, Choice, within_bits, within_divergence
from exporter.core.errors import BudgetError

Units = dict[str, list[Choice]]


def random_units(seed: int, units: int = 5, choices: int = 4) -> Units:
    rng = np.random.default_rng(seed)
    found: Units = {}
    for unit in range(units):
        size, cost = rng.integers(1, 9), rng.uniform(0.1, 10)
        bits = np.sort(rng.choice(np.arange(4, 17), choices, replace=False)) * size
        costs = cost * 4.0 ** -(bits / size) * rng.uniform(0.7, 1.4, choices)
        found[f"u{unit}"] = [
            Choice(f"p{i}", float(b), float(c)) for i, (b, c) in enumerate(zip(bits, costs, strict=True))
        ]
    return found


def combinations(units: Units) -> list[tuple[float, float]]:
    """(bits, divergence) of each combination."""
    return [(sum(c.bits for c in pick), sum(c.divergence for c in pick)) for pick in itertools.product(*units.values())]


@pytest.mark.parametrize("seed", range(20))
def test_within_bits_is_the_best_of_all_combinations(seed: int) -> None:
    units = random_units(seed)
    everything = combinations(units)
    smallest, largest = min(everything)[0], max(bits for bits, _ in everything)
    for budget in np.linspace(smallest, largest, 7):
        found = within_bits(units, budget)
        assert found.bits <= budget
        # Exact but for what rounding each unit up to whole parts can take: less than one part each.
        room = budget - len(units) * (budget - smallest) / CELLS
        assert found.divergence <= min([cost for bits, cost in everything if bits <= room], default=np.inf) * (
            1 + 1e-12
        )


@pytest.mark.parametrize("seed", range(10))
def test_within_divergence_keeps_the_limit_and_drops_bits(seed: int) -> None:
    units = random_units(seed)
    everything = combinations(units)
    costs = sorted(cost for _, cost in everything)
    part = (max(everything)[0] - min(everything)[0]) / (CELLS - len(units))
    for limit in (costs[0], costs[len(costs) // 2], costs[-1]):
        found = within_divergence(units, limit)
        assert found.divergence <= limit * (1 + 1e-12)
        fewest = min(bits for bits, cost in everything if cost <= limit)
        assert fewest <= found.bits <= fewest + len(units) * part
    assert within_divergence(units, costs[-1]).bits == min(bits for bits, _ in combinations(units))


def test_choices_that_are_larger_and_worse_are_never_taken() -> None:
    units = {"a": [Choice("small", 4, 1.0), Choice("bad", 6, 2.0), Choice("large", 8, 0.1)]}
    assert within_bits(units, 7).chosen["a"].name == "small"
    assert within_bits(units, 8).chosen["a"].name == "large"


def test_impossible_budgets_are_refused_with_the_numbers() -> None:
    units = {"a": [Choice("small", 8e6, 1.0), Choice("large", 16e6, 0.5)]}
    with pytest.raises(BudgetError, match=r"1 MB, 0\.5 MB asked"):
        within_bits(units, 4e6)
    with pytest.raises(BudgetError, match=r"0\.5, 0\.25 asked"):
        within_divergence(units, 0.25)
