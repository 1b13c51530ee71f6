"""The graphs after trace, fuse and quantize held to the eager model, one layer of all of them at a time.

Each stage runs twice beside the eager layer: chained (its own hidden states from the start) and locally (the eager
model's hidden states and caches as input), so that a fault shows in the layer that has it. The quantized graph's
local reference is the eager layer with the recipe's rounded weights: a lossless stage like the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exporter.core.canonical import Slice
from exporter.parity.graph_slice import GraphLayer, SliceRunner
from exporter.parity.head_check import HeadCheck
from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import CHAINED_ERROR, EagerLimits, local_error, within
from exporter.parity.metrics import ErrorSums, LogitMetrics, relative_l2_error
from exporter.parity.reference import EagerLayer, EagerModel, LayerOutput
from exporter.parity.report import Check, Divergence, StageResult, eager_checks
from exporter.parity.schedule import Step, main_steps, ragged_steps
from exporter.parity.scoring import Scored, scored_positions, take, targets


class SlicedModel(Protocol):
    """A model in slices: traced or canonical."""

    @property
    def embedding(self) -> Slice: ...

    @property
    def layers(self) -> Sequence[Slice]: ...

    @property
    def head(self) -> Slice: ...


@dataclass(frozen=True)
class EagerStep:
    """One eager layer at work: hidden states of all rows before it, and what it makes of each row."""

    index: int
    layer: EagerLayer | None
    before: list[np.ndarray]
    after: list[LayerOutput]


class StageTrack:
    """One stage on its way through the layers.

    `expected` is the eager model with the weights this stage should have; `limits` is the row that its logits are
    held to against the reference; `lossless` also holds its hidden states to rounding.
    """

    def __init__(
        self,
        stage: str,
        model: SlicedModel,
        runner: SliceRunner,
        expected: EagerModel,
        limits: EagerLimits,
        inputs: ParityInputs,
        *,
        lossless: bool,
    ) -> None:
        self.stage, self.model, self.runner, self.expected = stage, model, runner, expected
        self.limits, self.inputs, self.lossless = limits, inputs, lossless
        self.local_limit = local_error(expected.config)
        plan = inputs.plan
        self.main_steps = main_steps(inputs.prefill, inputs.decode, plan.single_steps, plan.chunk)
        self.ragged_steps = ragged_steps(inputs.ragged_prompts, inputs.ragged_steps)
        self.layer_errors: list[float] = []
        self.local_errors: list[float] = []
        self.divergence: Divergence | None = None
        self.metrics: LogitMetrics | None = None
        self._hidden: list[np.ndarray] = []

    @property
    def going(self) -> bool:
        return self.divergence is None

    def embed(self, reference: list[np.ndarray]) -> None:
        """The embedding slice, against the expected embedding and the reference's."""
        found = self.runner.embed(self.model.embedding, self.inputs.rows)
        expected = self.expected.embed(self.inputs.rows)
        self._record_local(_error(expected, found), None, "embedding")
        self._hidden = [found[0][: self.inputs.main_length], *found[1:]]
        self._record_chained(self._own(reference), None)

    def advance(self, step: EagerStep, local: EagerLayer) -> None:
        """Layer `step.index`; `local` is the same layer with this stage's weights."""
        layer = self.runner.layer(self.model.layers[step.index], local.tensors)
        self._record_local(self._local_error(layer, step, local), step.index)
        main, *ragged = self._hidden
        capacity = self.inputs.main_length
        self._hidden = [
            *layer.run([main], self.main_steps, layer.cache(1, capacity)),
            *layer.run(ragged, self.ragged_steps, layer.cache(len(ragged), self._ragged_capacity)),
        ]
        self._record_chained(self._own([out.hidden for out in step.after]), step.index)

    def head_check(self, hidden: list[np.ndarray], reference: EagerModel) -> HeadCheck:
        """The check of the head, to be fed with the reference's logits of `head_positions`; then `finish`."""
        scored = self.inputs_scored
        expected = None if self.expected is reference else self.expected
        following = targets(self.inputs, scored)
        return HeadCheck(
            self.runner, self.model.head, take(self._hidden, scored), take(hidden, scored), expected, following
        )

    @property
    def inputs_scored(self) -> list[Scored]:
        """The positions whose logits are compared: those of the rows that a stage runs as a whole."""
        return [each for each in scored_positions(self.inputs) if each.group != "tail"]

    def finish(self, check: HeadCheck) -> None:
        self.metrics = check.metrics
        self._record_local(check.local_error, None, "head")

    def fail(self, index: int | None, why: str, part: str = "layer") -> None:
        """A slice could not be run at all."""
        self.local_errors.append(math.inf)
        self.divergence = self.divergence or Divergence(self.stage, index, None, math.inf, part, note=why)

    def result(self) -> StageResult:
        checks = [Check("local_error", max(self.local_errors, default=None), self.local_limit, self.stage)]
        if self.lossless:
            checks.append(Check("hidden_error", max(self.layer_errors, default=None), CHAINED_ERROR, self.stage))
        if self.metrics is not None:
            checks.extend(eager_checks(self.metrics, self.limits, self.stage))
        return StageResult(
            self.stage, tuple(checks), tuple(self.layer_errors), tuple(self.local_errors), self.divergence
        )

    @property
    def _ragged_capacity(self) -> int:
        return max(int((step.starts + step.width).max()) for step in self.ragged_steps)

    def _own(self, reference: list[np.ndarray]) -> list[np.ndarray]:
        return [reference[0][: self.inputs.main_length], *reference[1:]]

    def _local_error(self, layer: GraphLayer, step: EagerStep, local: EagerLayer) -> float:
        """Ragged prompts, decode steps and the last positions of the long row, all from the reference's values.

        The largest relative L2 of hidden states, keys and values: a fault before attention shows in keys and values
        even where it drowns in the residual.
        """
        rows, sums = step.before[1:], (ErrorSums(), ErrorSums(), ErrorSums())
        cache = layer.cache(len(rows), self._ragged_capacity)
        found = layer.run(rows, self.ragged_steps, cache)
        for b, row in enumerate(found):
            expected = step.after[b + 1] if local is step.layer else local.run(rows[b])
            _add(sums, expected, LayerOutput(row, *cache.held(b, len(row))))
        long_row, eager = step.before[0], step.after[0]
        start = len(long_row) - self.inputs.tail
        past = (eager.keys[:, :start], eager.values[:, :start])
        if local is not step.layer:
            eager = local.run(long_row[start:], past)
        # The keys and values before are the same array on both sides.
        tail = layer.filled_cache(*past, len(long_row))
        found = layer.run([long_row], [Step.single(start, self.inputs.tail)], tail)
        new = slice(start, None)
        exact = LayerOutput(eager.hidden[-self.inputs.tail :], eager.keys[:, new], eager.values[:, new])
        keys, values = tail.held(0, len(long_row))
        _add(sums, exact, LayerOutput(found[0][new], keys[:, new], values[:, new]))
        return max(each.value for each in sums)

    def _record_local(self, error: float, index: int | None, part: str = "layer") -> None:
        self.local_errors.append(error)
        if not within(error, self.local_limit):
            self.divergence = self.divergence or Divergence(self.stage, index, None, error, part)

    def _record_chained(self, reference: list[np.ndarray], index: int | None) -> None:
        error = _error(reference, self._hidden)
        self.layer_errors.append(error)
        if not within(error, CHAINED_ERROR if self.lossless else None):
            part = "embedding" if index is None else "layer"
            self.divergence = self.divergence or Divergence(self.stage, index, None, error, part)


def _error(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    if len(expected) == 1:
        return relative_l2_error(expected[0], found[0])
    sums = ErrorSums()
    for exact, row in zip(expected, found, strict=True):
        sums.add(exact, row)
    return sums.value


def _add(sums: tuple[ErrorSums, ErrorSums, ErrorSums], expected: LayerOutput, found: LayerOutput) -> None:
    sums[0].add(expected.hidden, found.hidden)
    sums[1].add(expected.keys, found.keys)
    sums[2].add(expected.values, found.values)
