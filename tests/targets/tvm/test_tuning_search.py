from collections.abc import Callable
from dataclasses import replace

import pytest

from targets.tvm.isa import PROFILES
from targets.tvm.tuning import DEFAULT, Tuning
from targets.tvm.tuning_search import candidates, search

ISA = PROFILES["x86-64-v3"]


class Clock:
    """Time that passes with every comparison: `seconds` each."""

    def __init__(self, cost: Callable[[Tuning], float], seconds: float = 1.0) -> None:
        self.cost, self.seconds, self.now, self.compared = cost, seconds, 0.0, 0

    def __call__(self) -> float:
        return self.now

    def compare(self, phase: str, a: Tuning, b: Tuning) -> float:
        self.now += self.seconds
        self.compared += 1
        return self.cost(b) / self.cost(a)


def ignore(fraction: float, what: str) -> None: ...


def test_every_parameter_finds_its_best_value() -> None:
    clock = Clock(
        lambda tuning: 10 + abs(tuning.prefetch - 2048) / 1024 + abs(tuning.tile_rows - 3) + tuning.chunk / 64
    )
    best = search(ISA, DEFAULT, 1000, clock.compare, ignore, clock)
    assert best == Tuning(prefetch=2048, tile_rows=3, chunk=128)
    assert clock.now < 1000, "a round without change ends the search"


def test_time_ends_the_search() -> None:
    clock, told = Clock(lambda tuning: 1.0), []
    assert (
        search(ISA, DEFAULT, 3, clock.compare, lambda fraction, what: told.append((fraction, what)), clock) == DEFAULT
    )
    assert clock.compared == 3
    assert told[0] == (0.0, "tuning prefetch 0")
    assert [fraction for fraction, _ in told] == sorted(fraction for fraction, _ in told)


def test_differences_within_the_noise_change_nothing() -> None:
    clock = Clock(lambda tuning: 1.0 if tuning == DEFAULT else 0.99)
    assert search(ISA, DEFAULT, 1000, clock.compare, ignore, clock) == DEFAULT


def test_a_win_that_does_not_repeat_is_none() -> None:
    def lucky(phase: str, a: Tuning, b: Tuning) -> float:
        return 0.5  # whoever comes second

    assert search(ISA, DEFAULT, 1000, lucky, ignore, Clock(lambda _: 1.0)) == DEFAULT


@pytest.mark.parametrize("isa", PROFILES.values(), ids=lambda isa: isa.name)
def test_candidates_are_tunings(isa) -> None:
    for name, phase, values in candidates(isa):
        assert phase in ("decode", "prefill")
        for value in values:
            assert getattr(replace(DEFAULT, **{name: value}), name) == value
