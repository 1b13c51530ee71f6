"""An engine held to its simulation slice by slice, each slice given the engine's own input.

Where activations are rounded to int8, or cached keys and values, two faithful computations part ways: a sum that
differs in its last bit flips a code, the flip flips others further down, and logits end up apart by as much as the
rounding itself costs. Given the engine's own hidden states at every layer boundary, that can only happen within a
layer, and a fault is seen in the very layer that has it.

What happens within a layer is measured: the simulation is run again from hidden states disturbed by float32 rounding,
more than once if need be. The square of how far it parts from itself is taken off the square of how far the engine
parts from it, both over the same positions. A faithful engine is left with little; a fault keeps its size unless the
simulation itself parts as far.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

import numpy as np

from exporter.core.disk import output_errors
from exporter.parity.engine_run import OpenRunner, SingleRow, join_rows
from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import SIMULATION_FP32
from exporter.parity.metrics import ErrorSums, relative_l2_error
from exporter.parity.reference import EagerLayer, EagerModel
from exporter.parity.scoring import Advance, Scored, column_blocks, columns, scored_positions

FLOAT32_ROUNDOFF = 2.0**-24
"""How far hidden states are disturbed, relative, for engines that compute in float32: its unit roundoff. Measured on a
2048-wide model: such a simulation parts from itself by 1.41e-2 and 6.5e-4 in two layers where the engine parts from it
by 1.38e-2 and 1.01e-3."""

DRAWS = 8
"""A value on a tie flips every other time, and a single one can be all that there is, where the rest of the row attends
to it: at the end of a row, four runs part by 1.3e-2, 1.7e-2, 1.3e-2 and 5.6e-3, the engine by 1.5e-2. One run would
let chance decide. So the largest of this many counts; once the engine is explained, no more are made."""
EXPLAINED = SIMULATION_FP32 / 2
"""What may be left."""


@dataclass(frozen=True)
class LayerwiseErrors:
    """Relative L2 of each slice's output (embedding, layers, head), the engine against its simulation, less what the
    simulation's own rounding explains at these positions (`flips`: the largest; zero where nothing is rounded on the
    way).

    `all` over every position of every row; `decoded` over positions that went through the cache one at a time;
    `tail` over the last positions of a full cache. `instrumented`: logits of the engine that shows its hidden
    states against those of the plain one.
    """

    all: tuple[float, ...]
    decoded: tuple[float, ...]
    tail: tuple[float, ...]
    instrumented: float
    flips: tuple[float, ...]


def layerwise_errors(
    open_runner: OpenRunner,
    plain_logits: np.ndarray,
    simulation: EagerModel,
    inputs: ParityInputs,
    advance: Advance,
    roundoff: float = FLOAT32_ROUNDOFF,
) -> LayerwiseErrors:
    """Run the engine over all scored rows with its hidden states shown, then the simulation from each of them.
    `roundoff`: of the engine's arithmetic."""
    config, scored = simulation.config, scored_positions(inputs)
    with HiddenStates(config.num_layers + 1, config.hidden_size) as states:
        logits = _instrumented(open_runner, scored, inputs, states, advance)
        sums = _Sums(inputs, scored)
        rows = [inputs.rows[each.row][: each.positions[-1] + 1] for each in scored]
        sums.add(simulation.embed(rows), states.read(0, rows))
        for index in range(config.num_layers):
            advance(0.5 + 0.5 * index / (config.num_layers + 1), f"simulation, layer {index} of {config.num_layers}")
            layer = simulation.layer(index)
            exact = [layer.run(row).hidden for row in states.read(index, rows)]
            again = _disturbed_runs(layer, partial(states.read, index, rows), roundoff) if simulation.rounds else ()
            sums.add(exact, states.read(index + 1, rows), again)
            del layer
        final = [row[each.shown] for row, each in zip(states.read(config.num_layers, rows), scored, strict=True)]
    head = _head_errors(simulation, final, logits)
    shown = np.concatenate([np.isin(each.positions, each.shown) for each in scored])
    return LayerwiseErrors(
        (*sums.all, head[0]),
        (*sums.decoded, head[1]),
        (*sums.tail, head[2]),
        relative_l2_error(plain_logits[shown], logits),
        tuple(sums.flips),
    )


def _instrumented(
    open_runner: OpenRunner, scored: Sequence[Scored], inputs: ParityInputs, states: "HiddenStates", advance: Advance
) -> np.ndarray:
    """Logits [R, V] at the shown positions; hidden states go to `states`, row after row."""
    with open_runner(1, len(inputs.long_row), True) as runner:
        row = SingleRow(runner, inputs, states.append)
        logits = []
        for index, each in enumerate(scored):
            advance(0.5 * index / len(scored), f"engine with hidden states, {each.group} row")
            logits.append(row.score(each))
    return join_rows(logits)


class HiddenStates:
    """The residual stream of many positions at every layer boundary, in temporary files: too much for memory where
    rows are long."""

    def __init__(self, boundaries: int, width: int) -> None:
        self._width = width
        self._boundaries = boundaries
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        for _ in range(self._boundaries):
            self._files.append(self._stack.enter_context(tempfile.TemporaryFile()))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def append(self, hidden: list[np.ndarray]) -> None:
        """One call's states: for each boundary [1, S, H]."""
        for file, state in zip(self._files, hidden, strict=True):
            with output_errors(Path(tempfile.gettempdir())):
                file.seek(0, 2)
                file.write(np.ascontiguousarray(state[0], np.float32).data)

    def read(self, boundary: int, rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The states [S, H] of one boundary, row by row in the order they were appended."""
        position = 0
        for row in rows:
            out = np.empty((len(row), self._width), np.float32)
            self._files[boundary].seek(position)
            if self._files[boundary].readinto(out.data.cast("B")) != out.nbytes:  # type: ignore[attr-defined]
                raise ValueError(f"the engine showed fewer than {len(row)} positions at boundary {boundary}")
            position += out.nbytes
            yield out


class _Sums:
    """Errors of one slice after another, over all positions, decoded ones, and the tail."""

    def __init__(self, inputs: ParityInputs, scored: Sequence[Scored]) -> None:
        self._scored = scored
        self.all: list[float] = []
        self.decoded: list[float] = []
        self.tail: list[float] = []
        self.flips: list[float] = []

    def add(
        self,
        expected: Sequence[np.ndarray],
        found: Iterable[np.ndarray],
        again: Iterable[Iterable[np.ndarray]] = (),
    ) -> None:
        """A slice's outputs [S, H] for each row. `again`: what else the simulation makes of them, if it rounds; no more
        of it is looked at than it takes to explain what was found."""
        errors, flips = self._apart(expected, found), (0.0, 0.0, 0.0)
        left = errors
        for other in again:
            own = self._apart(expected, other)
            flips = (max(flips[0], own[0]), max(flips[1], own[1]), max(flips[2], own[2]))
            left = (less(errors[0], flips[0]), less(errors[1], flips[1]), less(errors[2], flips[2]))
            if max(left) <= EXPLAINED:
                break
        for values, value in zip((self.all, self.decoded, self.tail), left, strict=True):
            values.append(value)
        self.flips.append(max(flips))

    def _apart(self, expected: Iterable[np.ndarray], found: Iterable[np.ndarray]) -> tuple[float, float, float]:
        sums = _SliceSums()
        for each, exact, other in zip(self._scored, expected, found, strict=True):
            sums.add(each, exact, other)
        return sums.values


def less(error: float, flips: float) -> float:
    """What is left of an error after what flips explain, in squares; infinity stays what it is."""
    return math.sqrt(max(0.0, error**2 - flips**2)) if math.isfinite(error) else math.inf


def _disturbed_runs(
    layer: EagerLayer, before: Callable[[], Iterable[np.ndarray]], roundoff: float
) -> Iterator[Iterator[np.ndarray]]:
    """What a layer of the simulation makes of all rows [S, H] when they are disturbed, DRAWS times."""
    generator = np.random.default_rng(0)

    def disturbed(row: np.ndarray) -> np.ndarray:
        noise = generator.standard_normal(row.shape, np.float32) * np.float32(roundoff)
        return layer.run(row * (1 + noise)).hidden

    for _ in range(DRAWS):
        yield map(disturbed, before())


class _SliceSums:
    """How far outputs of a slice are apart: over all positions, decoded ones, and the tail."""

    def __init__(self) -> None:
        self._all, self._decoded, self._tail = ErrorSums(), ErrorSums(), ErrorSums()

    def add(self, scored: Scored, expected: np.ndarray, found: np.ndarray) -> None:
        """[S, H] each, of one row."""
        self._all.add(expected, found)
        part = self._tail if scored.group == "tail" else self._decoded
        part.add(expected[scored.steps], found[scored.steps])

    @property
    def values(self) -> tuple[float, float, float]:
        return self._all.value, self._decoded.value, self._tail.value


def _head_errors(simulation: EagerModel, final: list[np.ndarray], logits: np.ndarray) -> tuple[float, float, float]:
    """The head from the engine's own last hidden states: over all scored positions, all but the tail, the tail."""
    every, decoded, tail = ErrorSums(), ErrorSums(), ErrorSums()
    split = len(logits) - len(final[-1])
    exact = columns(simulation, np.concatenate(final))
    for expected, found in zip(exact, column_blocks(logits, simulation), strict=True):
        every.add(expected, found)
        decoded.add(expected[:split], found[:split])
        tail.add(expected[split:], found[split:])
    return every.value, decoded.value, tail.value
