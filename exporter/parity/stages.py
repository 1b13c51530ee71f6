"""All stages through all layers: the eager model runs layer by layer, and every stage's graphs run beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.weight_rows import WeightRows
from exporter.core.canonical import CanonicalModel, Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Recipe
from exporter.parity.activations import asked_rounding
from exporter.parity.basis import residual_basis
from exporter.parity.graph_slice import GraphLayer, SliceFailed, SliceRunner
from exporter.parity.head_check import faulty_operator
from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import FP32, eager_limits
from exporter.parity.local_check import EagerStep
from exporter.parity.localise import Evidence, Suspect, localise
from exporter.parity.reference import EagerLayer, EagerModel
from exporter.parity.report import Divergence, StageResult
from exporter.parity.scoring import Advance, Expectation, Recorder, columns, take
from exporter.parity.track import SlicedModel, StageTrack
from exporter.parity.weight_values import RecipeValues, WeightPrecisions
from exporter.recipe_numbers import RecipeNumbers


@dataclass(frozen=True)
class StageResults:
    """What the graphs showed, in the order of the stages that were run, and what the eager model said beside them
    (None where the walk ended early)."""

    stages: tuple[StageResult, ...]
    reference: Expectation | None = None

    @property
    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages)

    @property
    def first_divergence(self) -> Divergence | None:
        """Of the earliest stage that has one. Where only the sum of errors is too large, the layer that adds most."""
        for stage in self.stages:
            if stage.divergence:
                return stage.divergence
            if not stage.passed:
                return _worst_layer(stage)
        return None


def verify_stages(
    checkpoint: Checkpoint,
    traced: SlicedModel,
    fused: CanonicalModel,
    quantized: CanonicalModel,
    numbers: RecipeNumbers,
    recipe: Recipe,
    inputs: ParityInputs,
    advance: Advance,
) -> StageResults:
    """Hold the graphs of every stage to the eager model.

    `numbers` are what the build quantizes with; `quantized` is the canonical model after the recipe (left out as a
    stage of its own where the recipe changes no weight). A stage that diverges, and those after it, stop there; the
    earlier ones go on, so that the first faulty stage is named. `advance(fraction, detail)` reports progress.
    """
    precisions, transformed = WeightPrecisions.from_model(quantized), numbers.checkpoint is not checkpoint
    reference = EagerModel(checkpoint, chunk=inputs.plan.chunk)
    rows = WeightRows(checkpoint) if transformed else numbers.rows
    tracks = [
        StageTrack(stage, model, SliceRunner(checkpoint.config, rows), reference, FP32, inputs, lossless=True)
        for stage, model in (("trace", traced), ("fuse", fused))
    ]
    if transformed or not precisions.lossless:
        tracks.append(_quantized_track(quantized, precisions, numbers, recipe, inputs, transformed))
    expectation = _StageRun(reference, tracks, inputs, advance).run()
    faulty = next((i for i, track in enumerate(tracks) if not track.going), len(tracks))
    return StageResults(tuple(track.result() for track in tracks[: faulty + 1]), expectation)


def _quantized_track(
    model: CanonicalModel,
    precisions: WeightPrecisions,
    numbers: RecipeNumbers,
    recipe: Recipe,
    inputs: ParityInputs,
    transformed: bool,
) -> StageTrack:
    """Beside the eager model with the recipe's weights, its inputs rounded as the recipe asks."""
    rounded = EagerModel(
        numbers.checkpoint,
        RecipeValues(numbers.rows, precisions),
        activation_rounding=precisions.rounding(asked_rounding),
        input_scales=numbers.input_scales,
        chunk=inputs.plan.chunk,
    )
    runner = SliceRunner(numbers.checkpoint.config, numbers.rows)
    basis = residual_basis(numbers.checkpoint) if transformed else None
    limits = eager_limits(recipe)
    return StageTrack("quantize", model, runner, rounded, limits, inputs, lossless=False, basis=basis)


class _StageRun:
    """The walk of the eager model and all tracks through embedding, layers and head."""

    def __init__(
        self, reference: EagerModel, tracks: Sequence[StageTrack], inputs: ParityInputs, advance: Advance
    ) -> None:
        self.reference, self.tracks, self.inputs, self.advance = reference, tracks, inputs, advance

    def run(self) -> Expectation | None:
        layers = self.reference.config.num_layers
        recorder = Recorder(self.reference, self.inputs)
        hidden = self.reference.embed(self.inputs.rows)
        recorder.record(hidden)
        self._embed(hidden)
        for index in range(layers):
            if not self._going():
                return None
            self.advance(index / (layers + 1), f"stages, layer {index} of {layers}")
            hidden = self._layer(index, hidden)
            recorder.record(hidden)
        self.advance(layers / (layers + 1), "stages, head")
        self._head(hidden)
        return recorder.expectation()

    def _embed(self, hidden: list[np.ndarray]) -> None:
        for track in self.tracks:
            try:
                track.embed(hidden)
            except SliceFailed as error:
                track.fail(None, str(error), "embedding")
            if track.divergence is not None:
                track.divergence = replace(track.divergence, operator="Gather")
                return

    def _head(self, hidden: list[np.ndarray]) -> None:
        tracks = self._going()
        if not tracks:
            return
        scored = tracks[0].inputs_scored
        exact = take(hidden, scored)
        checks = {track.stage: track.head_check(hidden, self.reference) for track in tracks}
        for block in columns(self.reference, exact):
            for track in self._going():
                try:
                    checks[track.stage].block(block)
                except SliceFailed as error:
                    track.fail(None, str(error), "head")
        for track in self._going():
            track.finish(checks[track.stage])
            if track.divergence is not None:
                self._blame_head(track, take(track.final_states(hidden), scored))

    def _blame_head(self, track: StageTrack, exact: np.ndarray) -> None:
        found = faulty_operator(track.runner, track.model.head, exact, track.expected.normalise(exact))
        if found is not None and track.divergence is not None:
            track.divergence = replace(track.divergence, operator=found[0], value=found[1])

    def _going(self) -> list[StageTrack]:
        """The stages before the first that diverged."""
        stopped = next((i for i, track in enumerate(self.tracks) if not track.going), len(self.tracks))
        return list(self.tracks[:stopped])

    def _layer(self, index: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        layer = self.reference.layer(index)
        step = EagerStep(index, layer, hidden, [layer.run(row) for row in hidden])
        for track in self._going():
            if track.expected is self.reference:
                self._advance_track(track, step, layer)
        # The reference's weights are dropped before the recipe's are read.
        after = [out.hidden for out in step.after]
        del layer
        step = replace(step, layer=None)
        for track in self._going():
            if track.expected is not self.reference:
                self._advance_track(track, step, track.expected.layer(index))
        return after

    def _advance_track(self, track: StageTrack, step: EagerStep, local: EagerLayer) -> None:
        own = step if track.basis is None else None
        try:
            own = track.advance(step, local)
        except SliceFailed as error:
            track.fail(step.index, str(error))
        if track.divergence is not None and own is not None:
            track.divergence = self._localise(track, track.divergence, own, local)

    def _localise(self, track: StageTrack, found: Divergence, step: EagerStep, local: EagerLayer) -> Divergence:
        piece = track.model.layers[step.index]
        layer = _layer_of(track, piece, local)
        if layer is None:
            return found
        length = len(step.before[0])
        start = length - self.inputs.tail
        past = (step.after[0].keys[:, :start], step.after[0].values[:, :start])
        evidence = Evidence(step.before[1], self.inputs.ragged_prompts[0], step.before[0], past)
        suspect = Suspect(piece, layer, self._before(track, step.index, local), local, track.local_limit)
        return localise(found, suspect, evidence)

    def _before(self, track: StageTrack, index: int, local: EagerLayer) -> GraphLayer | None:
        """The layer of the stage before, with this stage's weights: what is left to differ is the graph. None where
        the stage rounds activations, which the one before does not."""
        position = self.tracks.index(track)
        if not position or track.expected.rounds:
            return None
        previous = self.tracks[position - 1]
        return previous.runner.layer(previous.model.layers[index], local.tensors)


def _layer_of(track: StageTrack, piece: Slice, local: EagerLayer) -> GraphLayer | None:
    try:
        return track.runner.layer(piece, local.tensors)
    except SliceFailed:
        return None


def _worst_layer(stage: StageResult) -> Divergence:
    """Where no slice is wrong but the whole misses a limit: the layer that adds most to the error.

    For a recipe that loses too much this names where it loses most.
    """
    squares = np.square(stage.layer_errors)
    if len(squares) < 2 or not np.isfinite(squares).all():
        return Divergence(stage.stage, None, None, np.inf, "model")
    layer = int(np.argmax(np.diff(squares)))
    note = "every slice equals its expectation; this layer adds most to the error against eager"
    return Divergence(stage.stage, layer, None, stage.layer_errors[layer + 1], note=note)
