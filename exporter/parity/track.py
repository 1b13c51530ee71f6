"""The graphs after trace, fuse and quantize held to the eager model, one layer of all of them at a time.

Each stage runs twice beside the eager layer: chained (its own hidden states from the start) and locally (the eager
model's hidden states and caches as input), so that a fault shows in the layer that has it. The quantized graph's
local reference is the eager layer with the recipe's rounded weights: a lossless stage like the others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from exporter.core.canonical import Slice
from exporter.parity.graph_slice import SliceRunner
from exporter.parity.head_check import HeadCheck
from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import CHAINED_ERROR, SIMULATION_COARSE, EagerLimits, local_error, within
from exporter.parity.local_check import EagerStep, local_error_of
from exporter.parity.metrics import ErrorSums, LogitMetrics, relative_l2_error
from exporter.parity.reference import EagerLayer, EagerModel
from exporter.parity.report import Check, Divergence, StageResult, eager_checks
from exporter.parity.schedule import main_steps, ragged_steps
from exporter.parity.scoring import Scored, scored_positions, take, targets

Basis = Callable[[np.ndarray], np.ndarray]
"""Hidden states [.., H] of eager as they stand in a model whose residual stream was transformed."""


class SlicedModel(Protocol):
    """A model in slices: traced or canonical."""

    @property
    def embedding(self) -> Slice: ...

    @property
    def layers(self) -> Sequence[Slice]: ...

    @property
    def head(self) -> Slice: ...


class StageTrack:
    """One stage on its way through the layers.

    `expected` is the eager model with the weights this stage should have, and its roundings of activations; `limits` is
    the row that its logits are held to against the reference; `lossless` also holds its hidden states to rounding.
    `basis` is for stages whose weights went through transforms: their hidden states, keys and values are others than
    eager's, so local inputs come from `expected` itself, and eager's hidden states are turned by `basis` before they
    are compared with the stage's own.
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
        basis: Basis | None = None,
    ) -> None:
        self.stage, self.model, self.runner, self.expected = stage, model, runner, expected
        self.limits, self.inputs, self.lossless = limits, inputs, lossless
        self.basis = basis
        self.local_limit = SIMULATION_COARSE if expected.rounds else local_error(expected.config)
        plan = inputs.plan
        self.main_steps = main_steps(inputs.prefill, inputs.decode, plan.single_steps, plan.chunk)
        self.ragged_steps = ragged_steps(inputs.ragged_prompts, inputs.ragged_steps)
        self.layer_errors: list[float] = []
        self.local_errors: list[float] = []
        self.flips: list[float] = []
        self.divergence: Divergence | None = None
        self.metrics: LogitMetrics | None = None
        self._hidden: list[np.ndarray] = []
        self._states: list[np.ndarray] = []

    @property
    def going(self) -> bool:
        return self.divergence is None

    def embed(self, reference: list[np.ndarray]) -> None:
        """The embedding slice, against the expected embedding and the reference's."""
        found = self.runner.embed(self.model.embedding, self.inputs.rows)
        expected = self.expected.embed(self.inputs.rows)
        self._states = expected if self.basis else []
        self._record_local(_error(expected, found), None, "embedding")
        self._hidden = [found[0][: self.inputs.main_length], *found[1:]]
        self._record_chained(self._own(reference), None)

    def advance(self, step: EagerStep, local: EagerLayer) -> EagerStep:
        """Layer `step.index`; `local` is the same layer with this stage's weights. Returns where local inputs came
        from: the step itself, or that of `expected` where its basis is another."""
        layer = self.runner.layer(self.model.layers[step.index], local.tensors)
        own = self._own_step(step, local)
        found = local_error_of(layer, own, local, self.inputs, self.ragged_steps, self.expected.rounds)
        self.flips.append(found.flips)
        self._record_local(found.value, step.index)
        self._states = [out.hidden for out in own.after] if self.basis else []
        main, *ragged = self._hidden
        capacity = self.inputs.main_length
        self._hidden = [
            *layer.run([main], self.main_steps, layer.cache(1, capacity)),
            *layer.run(ragged, self.ragged_steps, layer.cache(len(ragged), self._ragged_capacity)),
        ]
        self._record_chained(self._own([out.hidden for out in step.after]), step.index)
        return own

    def _own_step(self, step: EagerStep, local: EagerLayer) -> EagerStep:
        if self.basis is None:
            return step
        return EagerStep(step.index, local, self._states, [local.run(row) for row in self._states])

    def final_states(self, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """What enters the head where it is looked at alone; `hidden` is the reference's."""
        return self._states if self.basis else hidden

    def head_check(self, hidden: list[np.ndarray], reference: EagerModel) -> HeadCheck:
        """The check of the head, to be fed with the reference's logits of `head_positions`; then `finish`."""
        scored = self.inputs_scored
        expected = None if self.expected is reference else self.expected
        following = targets(self.inputs, scored)
        return HeadCheck(
            self.runner,
            self.model.head,
            take(self._hidden, scored),
            take(self.final_states(hidden), scored),
            expected,
            following,
        )

    @property
    def inputs_scored(self) -> list[Scored]:
        """The positions whose logits are compared: all of the rows that a stage runs as a whole, up to the last that an
        engine is scored at. A third of them would let chance decide: over 211 positions the perplexity of an FP8 model
        scatters by 0.6 % of eager's, over 633 by a third of that."""
        rows = (each for each in scored_positions(self.inputs) if each.group != "tail")
        return [replace(each, positions=np.arange(each.positions[-1] + 1)) for each in rows]

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
        if self.expected.rounds:
            checks.append(Check("rounding_flips", max(self.flips, default=None), None, self.stage))
        if self.metrics is not None:
            classifies = self.inputs.classifies
            checks.extend(eager_checks(self.metrics, self.limits, self.stage, classifies=classifies))
        return StageResult(
            self.stage, tuple(checks), tuple(self.layer_errors), tuple(self.local_errors), self.divergence
        )

    @property
    def _ragged_capacity(self) -> int:
        return max(int((step.starts + step.width).max()) for step in self.ragged_steps)

    def _own(self, reference: list[np.ndarray]) -> list[np.ndarray]:
        turned = [self.basis(row) for row in reference] if self.basis else reference
        return [turned[0][: self.inputs.main_length], *turned[1:]]

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
