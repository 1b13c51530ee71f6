"""An engine held to its simulation slice by slice, each slice given the engine's own input.

Where activations are rounded to int8, or cached keys and values, two faithful computations part ways: a sum that
differs in its last bit flips a code, the flip flips others further down, and logits end up apart by as much as the
rounding itself costs. Given the engine's own hidden states at every layer boundary, that can only happen within a
layer, and a fault is seen in the very layer that has it.

What happens within a layer is measured: the simulation is run once more from hidden states disturbed by float32
rounding. The square of how far it parts from itself is taken off the square of how far the engine parts from it, both
over the same positions. A faithful engine is left with little, and a fault keeps its full size.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np

from exporter.core.disk import output_errors
from exporter.parity.engine_run import OpenRunner, SingleRow, join_rows
from exporter.parity.inputs import ParityInputs
from exporter.parity.metrics import ErrorSums, relative_l2_error
from exporter.parity.reference import EagerLayer, EagerModel
from exporter.parity.scoring import Advance, Scored, column_blocks, columns, scored_positions

DISTURBANCE = 2.0**-24
"""Relative: the unit roundoff of float32. Measured on a 2048-wide model: such a simulation parts from itself by 1.41e-2
and 6.5e-4 in two layers where the engine parts from it by 1.38e-2 and 1.01e-3."""


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
    open_runner: OpenRunner, plain_logits: np.ndarray, simulation: EagerModel, inputs: ParityInputs, advance: Advance
) -> LayerwiseErrors:
    """Run the engine over all scored rows with its hidden states shown, then the simulation from each of them."""
    config, scored = simulation.config, scored_positions(inputs)
    with HiddenStates(config.num_layers + 1, config.hidden_size) as states:
        logits = _instrumented(open_runner, scored, inputs, states, advance)
        sums = _Sums(inputs, scored)
        rows = [inputs.rows[each.row][: each.positions[-1] + 1] for each in scored]
        sums.add(simulation.embed(rows), list(states.read(0, rows)))
        for index in range(config.num_layers):
            advance(0.5 + 0.5 * index / (config.num_layers + 1), f"simulation, layer {index} of {config.num_layers}")
            layer = simulation.layer(index)
            before, after = states.read(index, rows), states.read(index + 1, rows)
            sums.add_layer(layer, before, after, simulation.rounds)
            del layer
        final = [row[each.positions] for row, each in zip(states.read(config.num_layers, rows), scored, strict=True)]
    head = _head_errors(simulation, final, logits)
    return LayerwiseErrors(
        (*sums.all, head[0]),
        (*sums.decoded, head[1]),
        (*sums.tail, head[2]),
        relative_l2_error(plain_logits, logits),
        tuple(sums.flips),
    )


def _instrumented(
    open_runner: OpenRunner, scored: Sequence[Scored], inputs: ParityInputs, states: "HiddenStates", advance: Advance
) -> np.ndarray:
    """Logits [R, V] at the scored positions; hidden states go to `states`, row after row."""
    with open_runner(1, len(inputs.long_row), True) as runner:
        row = SingleRow(runner, inputs, states.append)
        logits = []
        for index, each in enumerate(scored):
            advance(0.5 * index / len(scored), f"engine with hidden states, {each.group} row")
            logits.append(row.teacher_forced(each))
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

    def add(self, expected: Iterable[np.ndarray], found: Iterable[np.ndarray]) -> None:
        sums = _SliceSums()
        for each, exact, shown in zip(self._scored, expected, found, strict=True):
            sums.add(each, exact, shown)
        self._keep(sums, _SliceSums())

    def add_layer(
        self, layer: EagerLayer, before: Iterable[np.ndarray], found: Iterable[np.ndarray], rounds: bool
    ) -> None:
        """A layer of the simulation run from `before`; where it rounds, once more from `before` disturbed."""
        sums, own, generator = _SliceSums(), _SliceSums(), np.random.default_rng(0)
        for each, row, shown in zip(self._scored, before, found, strict=True):
            exact = layer.run(row).hidden
            sums.add(each, exact, shown)
            if rounds:
                noise = generator.standard_normal(row.shape, np.float32) * np.float32(DISTURBANCE)
                own.add(each, exact, layer.run(row * (1 + noise)).hidden)
        self._keep(sums, own)

    def _keep(self, sums: "_SliceSums", own: "_SliceSums") -> None:
        for values, error, flips in zip((self.all, self.decoded, self.tail), sums.values, own.values, strict=True):
            values.append(math.sqrt(max(0.0, error**2 - flips**2)))
        self.flips.append(max(own.values))


class _SliceSums:
    """How far outputs of a slice are apart: over all positions, decoded ones, and the tail."""

    def __init__(self) -> None:
        self._all, self._decoded, self._tail = ErrorSums(), ErrorSums(), ErrorSums()

    def add(self, scored: Scored, expected: np.ndarray, found: np.ndarray) -> None:
        """[S, H] each, of one row."""
        steps = scored.positions[1:]
        self._all.add(expected, found)
        (self._tail if scored.group == "tail" else self._decoded).add(expected[steps], found[steps])

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
