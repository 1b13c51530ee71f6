"""An artifact that is a checkpoint, read back: its numbers held to those it was written from, its model to eager."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import HEAD, Checkpoint
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import read_tensor_rows, row_chunks
from exporter.parity.engine import STAGE, EngineResult, LogitSink
from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import STORED_AGAIN, STORED_FLOATS, eager_limits
from exporter.parity.metrics import ErrorSums
from exporter.parity.reference import EagerModel
from exporter.parity.report import Check, Divergence, StageResult, eager_checks
from exporter.parity.scoring import Advance, Expectation, columns, compare_logits, expect, scored_positions, targets
from exporter.parity.weight_values import WeightPrecisions, as_float
from exporter.recipe_numbers import RecipeNumbers
from targets.base import StoredModel, Target

SERVED = "not run: the server that loads the checkpoint has the cache"
UNKNOWN = "not run: the file of quantization parameters is needed, give it with --qparams"
KEEP_WEIGHTS = {"gptq"}
"""Algorithms that round weights otherwise and scale none of them."""
ROUNDED_WEIGHTS = 0.5
"""A coded matrix against the checkpoint's: int4 in rows of four standard deviations leaves 0.2, and anything else in
its place 1 or more."""
ReadRows = Callable[[CheckpointWeight, int, int], np.ndarray]
Groups = tuple[tuple[str, float, dict[str, float]], ...]
LAYER = re.compile(r"model\.layers\.(\d+)\.")
LEFT_TO_SERVER = ("decode_vs_prefill", "ragged_batch_vs_single", "long_position")


@dataclass(frozen=True)
class StoredValues:
    """The numbers of a stored model, decoded; `precisions` are those of the recipe."""

    stored: StoredModel
    precisions: WeightPrecisions

    def read(self, part: str, name: str, start: int, stop: int) -> np.ndarray:
        return self.stored.rows(name, start, stop)

    def precision(self, part: str, name: str) -> Precision:
        return self.precisions.get(part, name)


def verify_stored(
    stored: StoredModel,
    target: Target,
    recipe: Recipe,
    checkpoint: Checkpoint,
    numbers: RecipeNumbers | None,
    reference: Expectation,
    inputs: ParityInputs,
    advance: Advance,
    seen: LogitSink | None = None,
) -> EngineResult:
    """Check the files against their format, their numbers against `numbers` (None: unknown), and the model that they
    hold, its inputs and cache rounded as its server does it, against eager. Raises ArtifactError `stored.*`."""
    stored.validate()
    precisions = WeightPrecisions.from_recipe(recipe, stored.config)
    tight = (
        _held_to_numbers(stored, precisions, numbers)
        if numbers
        else _held_to_weights(stored, precisions, recipe, checkpoint)
    )
    model = EagerModel(
        replace(checkpoint, config=stored.config),
        StoredValues(stored, precisions),
        activation_rounding=precisions.rounding(target.activation_rounding),
        input_scales=stored.input_scales,
        kv_cache=recipe.kv_cache,
        kv_scales=stored.kv_scales,
        chunk=inputs.plan.chunk,
    )
    found = expect(model, inputs, advance)
    scored = scored_positions(inputs)
    head = slice(0, len(reference.final) - len(scored[-1].positions))
    metrics = compare_logits(
        columns(reference.model, reference.final[head]),
        columns(model, found.final[head]),
        targets(inputs, scored)[head],
    )
    if seen is not None:
        seen(inputs.main_positions, model.logits(found.final[: len(inputs.main_positions)]))
    left = (Check(name, None, None, STAGE, SERVED) for name in LEFT_TO_SERVER)
    checks = (*eager_checks(metrics, eager_limits(recipe), STAGE, classifies=inputs.classifies), *tight, *left)
    worst = next((check for check in tight if not check.passed), None)
    divergence = _divergence(worst) if worst else None
    stage = StageResult(STAGE, tight, divergence=divergence)
    return EngineResult(checks, metrics, stage, unsimulated=numbers is None, is_checkpoint=True)


def _held_to_numbers(stored: StoredModel, precisions: WeightPrecisions, numbers: RecipeNumbers) -> tuple[Check, ...]:
    """The largest relative L2 error of a tensor; apart for those that the form makes the writer round again."""
    errors = dict(
        _tensor_errors(stored, precisions, numbers.checkpoint, lambda w, *rows: as_float(numbers.rows(w, *rows)))
    )
    again = stored.requantized
    groups: Groups = (
        ("stored_weights_error", STORED_FLOATS, {name: e for name, e in errors.items() if name not in again}),
        ("requantized_weights_error", STORED_AGAIN, {name: e for name, e in errors.items() if name in again}),
    )
    return _worst(groups)


def _held_to_weights(
    stored: StoredModel, precisions: WeightPrecisions, recipe: Recipe, checkpoint: Checkpoint
) -> tuple[Check, ...]:
    """Without the numbers: every tensor is a rounding of the checkpoint's own, where no transform changed it."""
    unknown = Check("stored_weights_error", None, None, STAGE, UNKNOWN)
    if not set(recipe.algorithms) <= KEEP_WEIGHTS:
        return (unknown,)

    def own(weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
        return read_tensor_rows(checkpoint, weight.sources[0], start, stop)

    floats: dict[str, float] = {}
    coded: dict[str, float] = {}
    for name, error in _tensor_errors(stored, precisions, checkpoint, own):
        (coded if precisions.get(_part(name), name).is_coded else floats)[name] = error
    groups = (("float_weights_error", STORED_FLOATS, floats), ("rounded_weights_error", ROUNDED_WEIGHTS, coded))
    return (unknown, *_worst(groups))


def _worst(groups: Groups) -> tuple[Check, ...]:
    worst = ((title, limit, max(found.items(), key=lambda item: item[1])) for title, limit, found in groups if found)
    return tuple(Check(title, error, limit, STAGE, name) for title, limit, (name, error) in worst)


def _divergence(worst: Check) -> Divergence:
    """`note` of the check is the tensor's name."""
    layer = LAYER.match(worst.note)
    error = np.inf if worst.value is None else worst.value
    return Divergence(STAGE, int(layer[1]) if layer else None, None, error, "weights", worst.note)


def _part(name: str) -> str:
    return "layer" if name.startswith("model.layers.") else "embedding" if "embed" in name else "head"


def _tensor_errors(
    stored: StoredModel, precisions: WeightPrecisions, checkpoint: Checkpoint, read: ReadRows
) -> Iterator[tuple[str, float]]:
    config = stored.config
    for name, shape in config.tensor_shapes.items():
        # A form may write the head that a checkpoint ties to its embedding.
        source = checkpoint.config.head_source if name == HEAD else name
        weight, sums = CheckpointWeight((source,), precisions.get(_part(name), name)), ErrorSums()
        for start, stop in row_chunks(shape):
            sums.add(read(weight, start, stop), stored.rows(name, start, stop))
        yield name, sums.value
