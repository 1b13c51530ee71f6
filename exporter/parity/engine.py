"""A built engine held to its simulated quantization, to eager, and to itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from exporter.core.recipe import Recipe
from exporter.parity.chained_flips import chained_flips
from exporter.parity.engine_run import EngineRun, OpenRunner, run_engine
from exporter.parity.inputs import ParityInputs
from exporter.parity.layerwise import FLOAT32_ROUNDOFF, LayerwiseErrors, layerwise_errors, less
from exporter.parity.limits import EngineLimits, eager_limits, engine_limits, within
from exporter.parity.metrics import LogitMetrics
from exporter.parity.reference import EagerModel
from exporter.parity.report import Check, Divergence, StageResult, eager_checks
from exporter.parity.scoring import (
    Advance,
    Expectation,
    column_blocks,
    columns,
    compare_logits,
    scored_positions,
    targets,
)

STAGE = "compile"
SIMULATED = ("simulation_relative_l2_error", "decode_vs_prefill", "long_position", "instrumented_vs_plain")
"""Checks that need a simulation of the engine."""
WAYS = ("chunked_vs_prefill", "prefix_reuse", "ragged_batch_vs_single")
"""Checks of one way through an engine against another."""
WHOLE_PROMPTS = "not run: a classifier takes whole prompts, and decodes nothing"

LogitSink = Callable[[np.ndarray, np.ndarray], None]
"""(positions [R] of one row of text, logits [R, V])"""


@dataclass(frozen=True)
class Unsimulated:
    """In the place of a simulation that cannot be made: `why`. Whether the engine rounds activations is known."""

    why: str
    rounds_activations: bool


@dataclass(frozen=True)
class EngineResult:
    """What the engine showed. `metrics` is against eager; `stage` holds the errors slice by slice; `unsimulated`: there
    was no simulation to hold it to; `is_checkpoint`: there is no engine, its files were read back."""

    checks: tuple[Check, ...]
    metrics: LogitMetrics
    stage: StageResult
    unsimulated: bool = False
    is_checkpoint: bool = False

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def faithful(self) -> bool:
        """Whether the engine computes what its recipe says, however much the recipe loses."""
        return self.stage.divergence is None


def verify_engine(
    open_runner: OpenRunner,
    reference: Expectation,
    simulation: "EagerModel | Unsimulated",
    inputs: ParityInputs,
    recipe: Recipe,
    max_batch: int,
    advance: Advance,
    seen: LogitSink | None = None,
    *,
    roundoff: float = FLOAT32_ROUNDOFF,
) -> EngineResult:
    """Run an engine and compare it. `simulation` is the eager model with the recipe's weights (and its cache, and
    activations if the engine rounds them): the reference's own model for a lossless recipe. `seen` is shown the
    engine's logits at `ParityInputs.main_positions`. `roundoff`: of the engine's arithmetic."""
    half = roundoff > FLOAT32_ROUNDOFF
    limits = engine_limits(recipe, rounded_activations=simulation.rounds_activations, half_arithmetic=half)
    share = 1.0 if isinstance(simulation, Unsimulated) else 0.4
    labels = inputs.classifies
    run = run_engine(open_runner, inputs, max_batch, lambda f, detail: advance(share * f, detail))
    metrics = _against_eager(run, reference, inputs)
    if seen is not None:
        seen(inputs.main_positions, run.logits[: len(inputs.main_positions)])
    if isinstance(simulation, Unsimulated):
        unknown = (Check(name, None, None, STAGE, simulation.why) for name in SIMULATED)
        tight = (*unknown, *_consistency(run, limits))
        stage = StageResult(STAGE, tight, divergence=_off(tight))
        checks = (*eager_checks(metrics, eager_limits(recipe), STAGE, classifies=labels), *tight)
        return EngineResult(checks, metrics, stage, unsimulated=True)
    errors = layerwise_errors(
        open_runner, run.logits, simulation, inputs, lambda f, detail: advance(0.4 + 0.6 * f, detail), roundoff
    )
    tight = (
        Check("simulation_relative_l2_error", max(errors.all), limits.simulation, STAGE),
        Check("decode_vs_prefill", None, None, STAGE, WHOLE_PROMPTS)
        if labels
        else Check("decode_vs_prefill", max(errors.decoded), limits.simulation, STAGE),
        Check("long_position", max(errors.tail), limits.simulation, STAGE),
        Check("instrumented_vs_plain", errors.instrumented, limits.consistency, STAGE),
        *_consistency(run, limits),
        *([Check("rounding_flips", max(errors.flips), None, STAGE)] if simulation.rounds else []),
    )
    if half:
        tight = _less_flips(tight, simulation, inputs, roundoff)
    divergence = _divergence(errors, limits, tight)
    stage = StageResult(STAGE, tight, local_errors=errors.all, divergence=divergence)
    checks = (*eager_checks(metrics, eager_limits(recipe), STAGE, classifies=labels), *tight)
    return EngineResult(checks, metrics, stage)


def _against_eager(run: EngineRun, reference: Expectation, inputs: ParityInputs) -> LogitMetrics:
    """Over every scored position but the tail, whose context differs from the others' by length alone."""
    scored = scored_positions(inputs)
    head = slice(0, len(run.logits) - len(scored[-1].positions))
    exact = columns(reference.model, reference.final[head])
    return compare_logits(exact, column_blocks(run.logits[head], reference.model), targets(inputs, scored)[head])


def _consistency(run: EngineRun, limits: EngineLimits) -> tuple[Check, ...]:
    limit = limits.consistency
    if run.ragged is None:
        ragged = Check("ragged_batch_vs_single", None, None, STAGE, "the engine is built for one row")
    else:
        ragged = Check("ragged_batch_vs_single", run.ragged, limit, STAGE)
    ways = {"chunked_vs_prefill": run.chunked, "prefix_reuse": run.prefix_reuse}
    cached = (
        Check(name, None, None, STAGE, WHOLE_PROMPTS) if error is None else Check(name, error, limit, STAGE)
        for name, error in ways.items()
    )
    return (*cached, ragged)


def _less_flips(
    checks: tuple[Check, ...], simulation: EagerModel, inputs: ParityInputs, roundoff: float
) -> tuple[Check, ...]:
    """Where two ways through an engine in half precision part by more than their limit: what is left after what its
    rounding, and flips of codes, explain over the whole model; in squares as everywhere."""
    if all(check.passed for check in checks if check.name in WAYS):
        return checks
    positions = [inputs.ragged_positions(row) for row in range(len(inputs.ragged))]
    flips = chained_flips(simulation, inputs.ragged, positions, roundoff)
    left = [replace(c, value=less(c.value, flips)) if c.name in WAYS and c.value else c for c in checks]
    return (*left, Check("chained_flips", flips, None, STAGE))


def _divergence(errors: LayerwiseErrors, limits: EngineLimits, checks: tuple[Check, ...]) -> Divergence | None:
    """The first slice that is not what the simulation makes of the engine's own input. If all are, and a check still
    fails, the way through the cache is at fault."""
    last = len(errors.all) - 1
    for index, several in enumerate(zip(errors.all, errors.decoded, errors.tail, strict=True)):
        if all(within(error, limits.simulation) for error in several):
            continue
        worst = next((error for error in several if not np.isfinite(error)), max(several))
        if index in (0, last):
            part, operator = ("embedding", "Gather") if index == 0 else ("head", "MatMul")
            return Divergence(STAGE, None, operator, worst, part)
        return Divergence(STAGE, index - 1, None, worst)
    return _off(checks)


def _off(checks: tuple[Check, ...]) -> Divergence | None:
    """The way through the cache, where a check fails although no slice does."""
    failed = [check for check in checks if not check.passed]
    if failed and failed[0].value is not None:
        return Divergence(STAGE, None, None, failed[0].value, "cache", note=f"{failed[0].name} alone is off")
    return None
