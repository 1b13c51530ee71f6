"""An engine taken through every way into its cache, and what it said at each scored position."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.parity.inputs import ParityInputs
from exporter.parity.metrics import relative_l2_error
from exporter.parity.scoring import Advance, Scored, scored_positions
from targets.base import Runner

# Positions whose hidden states are held at once: about 10 MB a layer boundary at most.
PIECE = 256
OpenRunner = Callable[[int, int, bool], Runner]
"""(rows in the batch, positions in a row, whether hidden states are wanted) -> a runner, opened with `with`."""


@dataclass(frozen=True)
class EngineRun:
    """`logits` [R, V] of `scored_positions`. The rest: relative L2 of logits on another way against the plain one,
    the largest over what was compared; `ragged` None where the engine takes one row only, the others where it takes
    whole prompts only."""

    logits: np.ndarray
    chunked: float | None
    prefix_reuse: float | None
    ragged: float | None


def run_engine(open_runner: OpenRunner, inputs: ParityInputs, max_batch: int, advance: Advance) -> EngineRun:
    """Prefill, decode, chunks, a kept prefix, a full cache, a ragged batch (of a classifier: prompts, a prompt of full
    length, a ragged batch); at most one runner is open at a time."""
    scored = scored_positions(inputs)
    with open_runner(1, len(inputs.long_row), False) as runner:
        single = SingleRow(runner, inputs)
        logits = []
        for index, each in enumerate(scored):
            advance(index / (len(scored) + 3), f"engine, {each.group} row")
            logits.append(single.score(each))
        chunked, reuse = None, None
        if not inputs.classifies:
            advance(len(scored) / (len(scored) + 3), "engine, other ways through the cache")
            chunked, reuse = single.chunk_errors(logits[0][0])
    batch = min(max_batch, len(inputs.ragged))
    ragged = None
    if batch > 1:
        advance((len(scored) + 2) / (len(scored) + 3), "engine, ragged batch")
        positions = max(len(row) for row in inputs.ragged)
        with open_runner(batch, positions, False) as runner:
            ragged = ragged_error(runner, inputs, batch, logits[1 : 1 + batch])
    return EngineRun(join_rows(logits), chunked, reuse, ragged)


class SingleRow:
    """A runner of one row. `seen` receives its hidden states after every call of `teacher_forced`, and those of the
    longest prompt in `prompted`."""

    def __init__(self, runner: Runner, inputs: ParityInputs, seen: Callable[[list[np.ndarray]], None] | None = None):
        self.runner, self.inputs = runner, inputs
        self._seen = seen

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits [V] after the last of `ids` [S], from an empty cache."""
        return self.runner.prefill(ids[None], _lengths(ids))[0].copy()

    def extend(self, ids: np.ndarray) -> np.ndarray:
        return self.runner.extend(ids[None], _lengths(ids))[0].copy()

    def score(self, scored: Scored) -> np.ndarray:
        """Logits [n, V] at the scored positions, as the engine's users get them; at `shown` ones with `seen`."""
        return self.prompted(scored) if self.inputs.classifies else self.teacher_forced(scored)

    def prompted(self, scored: Scored) -> np.ndarray:
        """Logits [n, L] after whole prompts, each from an empty cache; the states of a prompt come in one piece."""
        row = self.inputs.rows[scored.row]
        logits = [self.prefill(row[: end + 1]) for end in (scored.positions if self._seen is None else scored.shown)]
        self._show()
        return np.stack(logits)

    def teacher_forced(self, scored: Scored) -> np.ndarray:
        """Logits [n, V] at the scored positions: the first by prefill, each further one by a decode step."""
        row, positions = self.inputs.rows[scored.row], scored.positions
        first = self._begin(row[: positions[0] + 1])
        out = np.empty((len(positions), len(first)), np.float32)
        out[0] = first
        for index, position in enumerate(positions[1:], 1):
            out[index] = self.runner.decode(row[position : position + 1], np.ones(1, bool))[0]
            self._show()
        return out

    def _begin(self, ids: np.ndarray) -> np.ndarray:
        """Prefill; in pieces where hidden states are wanted: those of a long row together would fill the memory."""
        if self._seen is None:
            return self.prefill(ids)
        logits = self.prefill(ids[:PIECE])
        self._show()
        for start in range(PIECE, len(ids), PIECE):
            logits = self.extend(ids[start : start + PIECE])
            self._show()
        return logits

    def _show(self) -> None:
        if self._seen is not None:
            self._seen(self.runner.hidden)

    def chunk_errors(self, expected: np.ndarray) -> tuple[float, float]:
        """The prompt in three uneven chunks; and again from a kept prefix after other ids went over it."""
        row, total = self.inputs.long_row[: self.inputs.prefill], self.inputs.prefill
        first, second = max(1, total // 3), max(2, total // 2)
        self.prefill(row[:first])
        self.extend(row[first:second])
        chunked = relative_l2_error(expected, self.extend(row[second:]))
        self.runner.truncate(0, first)
        self.extend(self.inputs.ragged[0][: self.inputs.ragged_prompts[0]][: total - first])
        self.runner.truncate(0, first)
        return chunked, relative_l2_error(expected, self.extend(row[first:]))


def ragged_error(runner: Runner, inputs: ParityInputs, batch: int, single: list[np.ndarray]) -> float:
    """A right-padded batch, then a generator's decode steps, against each row alone. In the first step the rows take
    turns."""
    rows, lengths = inputs.ragged[:batch], np.array(inputs.ragged_prompts[:batch], np.int64)
    ids = np.zeros((batch, int(lengths.max())), np.int64)
    for b, row in enumerate(rows):
        ids[b, : lengths[b]] = row[: lengths[b]]
    logits = runner.prefill(ids, lengths)
    errors = [relative_l2_error(single[b][0], logits[b]) for b in range(batch)]
    everyone = np.ones(batch, bool)
    for step in range(0 if inputs.classifies else inputs.ragged_steps):
        tokens = np.array([row[n + step] for row, n in zip(rows, lengths, strict=True)], np.int64)
        turns = [np.arange(batch) == 0, np.arange(batch) != 0] if step == 0 else [everyone]
        for active in turns:
            logits = runner.decode(tokens, active)
            errors.extend(relative_l2_error(single[b][step + 1], logits[b]) for b in np.flatnonzero(active))
    return max(errors)


def join_rows(parts: list[np.ndarray]) -> np.ndarray:
    """[R, V] from parts [r, V], which are let go one by one: logits are too large to be held twice."""
    out = np.empty((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
    start = 0
    while parts:
        part = parts.pop(0)
        out[start : start + len(part)] = part
        start += len(part)
    return out


def _lengths(ids: np.ndarray) -> np.ndarray:
    return np.array([len(ids)], np.int64)
