"""Which positions are compared, what follows them in the text, and what eager models say about them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from exporter.parity.inputs import ParityInputs
from exporter.parity.metrics import LogitComparison, LogitMetrics
from exporter.parity.reference import EagerModel

Advance = Callable[[float, str], None]


@dataclass(frozen=True)
class Scored:
    """Some positions of one row of `ParityInputs.rows`, where logits are compared.

    `steps`: where hidden states are compared apart from the others: decoded one at a time, or the row's end. `shown`:
    where an engine that shows its hidden states gives logits.
    """

    group: str
    row: int
    positions: np.ndarray
    steps: np.ndarray
    shown: np.ndarray


def scored_positions(inputs: ParityInputs) -> list[Scored]:
    """`main` (prefill and decode, or prompts), each `ragged` row, and the `tail` of the long row, in this order."""
    ragged = [_scored(inputs, "ragged", i + 1, inputs.ragged_positions(i)) for i in range(len(inputs.ragged))]
    main, tail = _scored(inputs, "main", 0, inputs.main_positions), _scored(inputs, "tail", 0, inputs.tail_positions)
    return [main, *ragged, tail]


def _scored(inputs: ParityInputs, group: str, row: int, positions: np.ndarray) -> Scored:
    """A generator's first position is prefilled, the others are decoded. A classifier decodes none: a row's longest
    prompt shows the states of all."""
    if not inputs.classifies:
        return Scored(group, row, positions, positions[1:], positions)
    end = positions[-1] + 1
    steps = np.arange(end - inputs.tail if group == "tail" else end, end)
    return Scored(group, row, positions, steps, positions[-1:])


def targets(inputs: ParityInputs, scored: Iterable[Scored]) -> np.ndarray:
    """The id that follows each scored position, int64 [R]; -1 at the end of a row, and where logits are of labels."""
    parts = []
    for each in scored:
        following = np.append(inputs.rows[each.row][1:], -1)
        parts.append(np.full(len(each.positions), -1) if inputs.classifies else following[each.positions])
    return np.concatenate(parts)


def take(hidden: list[np.ndarray], scored: Iterable[Scored]) -> np.ndarray:
    """Hidden states [R, H] of the scored positions out of rows [S, H]."""
    return np.concatenate([hidden[each.row][each.positions] for each in scored])


@dataclass(frozen=True)
class Expectation:
    """What an eager model says: hidden states leaving its last layer at all scored positions [R, H], and the
    residual stream [S, H] at every boundary for the prompt of the last ragged row."""

    model: EagerModel
    final: np.ndarray
    probe: list[np.ndarray]


def expect(model: EagerModel, inputs: ParityInputs, advance: Advance) -> Expectation:
    """Run an eager model over all rows."""
    recorder = Recorder(model, inputs)
    for index, hidden in enumerate(model.boundaries(inputs.rows)):
        recorder.record(hidden)
        advance(index / (model.config.num_layers + 1), f"layer {index} of {model.config.num_layers}")
    return recorder.expectation()


class Recorder:
    """Keeps of an eager model's hidden states, boundary by boundary, what an Expectation needs."""

    def __init__(self, model: EagerModel, inputs: ParityInputs) -> None:
        self._model, self._inputs = model, inputs
        self._probe: list[np.ndarray] = []
        self._final = np.empty(0)

    def record(self, hidden: list[np.ndarray]) -> None:
        """The residual stream [S, H] of all rows at the next boundary."""
        self._probe.append(hidden[-1][: self._inputs.ragged_prompts[-1]].copy())
        self._final = take(hidden, scored_positions(self._inputs))

    def expectation(self) -> Expectation:
        return Expectation(self._model, self._final, self._probe)


def compare_logits(
    reference: Iterable[np.ndarray], candidate: Iterable[np.ndarray], following: np.ndarray
) -> LogitMetrics:
    """Metrics over [R, C] blocks of vocabulary columns from two sides."""
    comparison = LogitComparison(following)
    for expected, found in zip(reference, candidate, strict=True):
        comparison.update(expected, found)
    return comparison.result()


def columns(model: EagerModel, hidden: np.ndarray) -> Iterable[np.ndarray]:
    """The logits of hidden states [R, H] in blocks of vocabulary columns."""
    return (block for _, _, block in model.logit_columns(hidden))


def column_blocks(logits: np.ndarray, model: EagerModel) -> Iterable[np.ndarray]:
    """Logits [R, V] that are already there, cut into the same blocks as `columns`."""
    return (logits[:, start:stop] for start, stop in model.column_ranges)
