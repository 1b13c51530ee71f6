"""One layer of a stage's graphs alone: given the hidden states and caches of its reference, against what that makes.

Where activations are rounded, two faithful computations part by whole codes where a value lies near a tie. How far is
measured, as for engines (layerwise.py): the reference is run again from inputs disturbed by float32 rounding, more than
once if need be, and the square of how far it parts from itself is taken off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from exporter.parity.graph_slice import GraphLayer
from exporter.parity.inputs import ParityInputs
from exporter.parity.layerwise import DRAWS, EXPLAINED, FLOAT32_ROUNDOFF
from exporter.parity.metrics import ErrorSums
from exporter.parity.reference import EagerLayer, LayerOutput
from exporter.parity.schedule import Step

Past = tuple[np.ndarray, np.ndarray]
Again = tuple["LayerOutput", "partial[LayerOutput]"]
"""What the reference makes of a row, and how it is run again."""


@dataclass(frozen=True)
class EagerStep:
    """One eager layer at work: hidden states of all rows before it, and what it makes of each row."""

    index: int
    layer: EagerLayer | None
    before: list[np.ndarray]
    after: list[LayerOutput]


@dataclass(frozen=True)
class LocalError:
    """Relative L2, the largest of hidden states, keys and values; `flips` is what was taken off for codes that flip."""

    value: float
    flips: float = 0.0


def local_error_of(
    layer: GraphLayer, step: EagerStep, local: EagerLayer, inputs: ParityInputs, ragged: Sequence[Step], rounds: bool
) -> LocalError:
    """Ragged prompts, decode steps and the last positions of the long row, all from the reference's values.

    `local` is the layer with the weights that the graph should have: `step.layer` where that is the reference's. A
    fault before attention shows in keys and values even where it drowns in the residual.
    """
    found, again = _Sums(), list[Again]()
    rows = step.before[1:]
    cache = layer.cache(len(rows), max(int((each.starts + each.width).max()) for each in ragged))
    for b, row in enumerate(layer.run(rows, ragged, cache)):
        expected = step.after[b + 1] if local is step.layer else local.run(rows[b])
        found.add(expected, LayerOutput(row, *cache.held(b, len(row))))
        again.append((expected, partial(_run_disturbed, local, rows[b])))
    long_row, start = step.before[0], len(step.before[0]) - inputs.tail
    past = (step.after[0].keys[:, :start], step.after[0].values[:, :start])
    exact = _tail(step.after[0] if local is step.layer else local.run(long_row[start:], past), inputs.tail)
    tail = layer.filled_cache(*past, len(long_row))
    ending = layer.run([long_row], [Step.single(start, inputs.tail)], tail)[0]
    found.add(exact, _tail(LayerOutput(ending, *tail.held(0, len(long_row))), inputs.tail))
    again.append((exact, partial(_run_disturbed, local, long_row[start:], past, inputs.tail)))
    return _explained(found.values, again) if rounds else LocalError(max(found.values))


def _explained(errors: Sequence[float], again: "Sequence[Again]") -> LocalError:
    """What is left of errors after the largest of up to DRAWS disturbed runs; one alone would let chance decide where
    many values lie on ties, as products of bfloat16 numbers do."""
    generator, flips, left = np.random.default_rng(0), [0.0, 0.0, 0.0], math.inf
    for _ in range(DRAWS):
        own = _Sums()
        for expected, run in again:
            own.add(expected, run(generator=generator))
        flips = [max(pair) for pair in zip(flips, own.values, strict=True)]
        left = _less(errors, flips)
        if left <= EXPLAINED:
            break
    return LocalError(left, max(flips))


def _run_disturbed(
    local: EagerLayer, row: np.ndarray, past: Past | None = None, tail: int = 0, *, generator: np.random.Generator
) -> LayerOutput:
    """A row [S, H] disturbed by float32 rounding, after a cached past; the new positions alone where `tail` says how
    many they are."""
    noise = generator.standard_normal(row.shape, np.float32)
    output = local.run(row * (1 + noise * np.float32(FLOAT32_ROUNDOFF)), past)
    return _tail(output, tail) if tail else output


def _tail(output: LayerOutput, length: int) -> LayerOutput:
    """The new positions alone: keys and values before are the same array on both sides."""
    return LayerOutput(output.hidden[-length:], output.keys[:, -length:], output.values[:, -length:])


def _less(errors: Sequence[float], flips: Sequence[float]) -> float:
    """The largest error, less what the reference's own rounding explains; NaN and infinity stay what they are."""
    if not all(map(math.isfinite, errors)):
        return math.inf
    return max(math.sqrt(max(0.0, error**2 - own**2)) for error, own in zip(errors, flips, strict=True))


class _Sums:
    """Errors of hidden states, keys and values over several rows."""

    def __init__(self) -> None:
        self._sums = (ErrorSums(), ErrorSums(), ErrorSums())

    def add(self, expected: LayerOutput, found: LayerOutput) -> None:
        self._sums[0].add(expected.hidden, found.hidden)
        self._sums[1].add(expected.keys, found.keys)
        self._sums[2].add(expected.values, found.values)

    @property
    def values(self) -> list[float]:
        return [each.value for each in self._sums]
