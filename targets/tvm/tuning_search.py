"""The search behind --tune: one parameter after the other, each value against the best so far, while time lasts."""

import time
from collections.abc import Callable
from dataclasses import replace

from targets.tvm.isa import Isa
from targets.tvm.tuning import Tuning

Report = Callable[[float, str], None]
"""Takes the fraction of the time that is spent, and what is being tried."""
Compare = Callable[[str, Tuning, Tuning], float]
"""(phase, a, b) -> time of b over time of a; phases are `decode` and `prefill`."""

GAIN = 0.98
"""A value is better when it takes less than this share of the time, twice: what is nearer lies in the noise."""


def candidates(isa: Isa) -> list[tuple[str, str, tuple[int, ...]]]:
    """(parameter, the phase it matters to, its values)."""
    tiles = (4, 5, 6, 7, 8) if isa.registers >= 32 else (2, 3, 4, 5)
    return [
        ("prefetch", "decode", (0, 2048, 4096, 6144, 8192, 12288, 16384)),
        ("tile_rows", "prefill", tiles),
        ("queries", "prefill", (96, 192, 384, 768)),
        ("chunk", "prefill", (128, 256, 512)),
    ]


def search(
    isa: Isa,
    start: Tuning,
    seconds: float,
    compare: Compare,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """The best tuning found. Ends early when a whole round over all parameters changes nothing.

    A comparison that has begun is finished: a search takes at most that much longer than `seconds`.
    """
    begin, best, before = clock(), start, None
    while best != before:
        before = best
        for name, phase, values in candidates(isa):
            tried = best
            for value in values:
                spent = clock() - begin
                if spent >= seconds:
                    return best
                candidate = replace(tried, **{name: value})
                report(spent / seconds, f"tuning {name} {value}")
                if candidate != best and _faster(compare, phase, best, candidate):
                    best = candidate
    return best


def _faster(compare: Compare, phase: str, best: Tuning, candidate: Tuning) -> bool:
    """Whether the candidate wins, also with the sides changed."""
    return compare(phase, best, candidate) < GAIN and compare(phase, candidate, best) > 1 / GAIN
