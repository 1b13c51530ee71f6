"""Entry points: verify a build (its graphs, then its engine), or an engine alone."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.canonical import CanonicalModel
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import Progress
from exporter.core.recipe import Recipe
from exporter.core.traced import TracedModel
from exporter.memory import release_free_memory
from exporter.parity.basis import residual_basis
from exporter.parity.engine import EngineResult, LogitSink, Unsimulated, verify_engine
from exporter.parity.inputs import ParityInputs, ParityPlan, parity_inputs, read_text
from exporter.parity.limits import CHAINED_BF16, SIMULATION_COARSE, eager_limits
from exporter.parity.metrics import relative_l2_error
from exporter.parity.reference import EagerModel
from exporter.parity.report import Check, Divergence, Proof, StageResult, VerifyReport, eager_checks
from exporter.parity.scoring import (
    Advance,
    Expectation,
    columns,
    compare_logits,
    expect,
    scored_positions,
    targets,
)
from exporter.parity.stages import StageResults, verify_stages
from exporter.parity.stored import verify_stored
from exporter.parity.weight_values import RecipeValues, WeightPrecisions
from exporter.recipe_numbers import RecipeNumbers
from targets.base import Limits, Runner, RunOptions, StoredModel, Target, built_by

FP16_ROUNDOFF = 2.0**-11


@dataclass(frozen=True)
class EngineUnderTest:
    """A built engine and what it was built from. `text`: a file to measure on instead of the built-in sample;
    `built_by`: the toolchain in words, where its versions do not say enough; `stands_in`: the engine cannot run here,
    and its own graph is executed on this CPU in its place; `ran`: what did so, in words."""

    target: Target
    directory: Path
    checkpoint: Checkpoint
    recipe: Recipe
    limits: Limits
    text: Path | None = None
    threads: int = 0
    plan: ParityPlan | None = None
    built_by: str = ""
    stands_in: bool = False
    ran: set[str] = field(default_factory=set)

    def open(self, batch: int, positions: int, hidden_states: bool) -> Runner:
        """A runner on the engine, or on what stands in for it, with room for `positions` in each row."""
        release_free_memory()  # what the eager layers left, or the runner before
        options = RunOptions(self.threads, batch, positions, hidden_states)
        found = self.target.stand_in if self.stands_in else self.target.runner
        runner = found(self.directory, self.checkpoint.config, self.limits, options)
        assert runner is not None
        if self.stands_in:
            self.ran.add(str(getattr(runner, "proof", "the engine's graph on the CPU")))
        return runner

    def stored_model(self) -> StoredModel | None:
        """What its files hold, where it is a checkpoint."""
        return self.target.stored_model(self.directory, self.checkpoint.config, self.recipe)

    def inputs(self) -> ParityInputs:
        text = read_text(self.text) if self.text else None
        checkpoint = self.checkpoint
        return parity_inputs(checkpoint.path, checkpoint.config, self.limits.max_seq_len, text, self.plan)


def verify_build(
    engine: EngineUnderTest,
    traced: TracedModel,
    fused: CanonicalModel,
    quantized: CanonicalModel,
    numbers: RecipeNumbers,
    progress: Progress,
    not_run: str = "",
) -> VerifyReport:
    """Hold every stage's graphs to eager, then the engine. Raises ParityError, with the report, if a gate fails.

    `numbers` are those that the engine was built with. A failed stage ends the verification there. `not_run` says why
    the engine cannot run here, if it cannot: what stands in for it, or else its simulation, is held to the limits
    instead, and the proof says so.
    """
    inputs = engine.inputs()
    stages = verify_stages(
        engine.checkpoint, traced, fused, quantized, numbers, engine.recipe, inputs, _part(progress, 0.0, 0.5)
    )
    if not stages.passed or stages.reference is None:
        report = _report(engine, inputs, stages)
    else:
        rest = _part(progress, 0.5, 1.0)
        if not_run and not engine.target.has_stand_in:
            simulation = _simulation(engine, stages.reference.model, numbers)
            simulated = _simulated(engine, stages.reference, simulation, inputs, rest)
            report = _report(engine, inputs, replace(stages, stages=(*stages.stages, *simulated)), not_run=not_run)
        else:
            subject = replace(engine, stands_in=bool(not_run))
            report = _report(
                subject, inputs, stages, _shown(subject, stages.reference, numbers, inputs, rest), not_run=not_run
            )
    report.require_passed(engine_run=not not_run)
    return report


def verify_artifact(
    engine: EngineUnderTest, progress: Progress, numbers: RecipeNumbers | None, seen: LogitSink | None = None
) -> VerifyReport:
    """Hold an engine to eager and to a simulation made from the checkpoint anew; nothing is traced.

    `numbers` are what its recipe was built with; without them it is held to eager alone, and the report says so.
    `seen` is shown the engine's logits. Returns the report, passed or not; `require_passed` raises. What graphs the
    engine came from is not looked at.
    """
    inputs = engine.inputs()
    reference = expect(EagerModel(engine.checkpoint), inputs, _part(progress, 0.0, 0.4))
    result = _shown(engine, reference, numbers, inputs, _part(progress, 0.4, 0.9), seen)
    if result.passed or not result.faithful or result.is_checkpoint or numbers is None:
        return _report(engine, inputs, None, result)
    simulation = _simulation(engine, reference.model, numbers)
    # The recipe is to blame: where, takes another walk, so it is done only now.
    rounded = expect(simulation, inputs, _part(progress, 0.9, 1.0))
    return _report(engine, inputs, None, result, _recipe_errors(reference, rounded))


def _shown(
    engine: EngineUnderTest,
    reference: Expectation,
    numbers: RecipeNumbers | None,
    inputs: ParityInputs,
    advance: Advance,
    seen: LogitSink | None = None,
) -> EngineResult:
    """What an artifact shows: the checkpoint that it is, or its engine at work."""
    if (stored := engine.stored_model()) is not None:
        return verify_stored(
            stored, engine.target, engine.recipe, engine.checkpoint, numbers, reference, inputs, advance, seen
        )
    simulation = _simulation(engine, reference.model, numbers) if numbers else _unsimulated(engine)
    return _run(engine, reference, simulation, inputs, advance, seen)


def _simulation(engine: EngineUnderTest, reference: EagerModel, numbers: RecipeNumbers) -> EagerModel:
    """The eager model with the recipe's weights and cache; the reference itself where the recipe changes nothing."""
    precisions, cache = WeightPrecisions.from_recipe(engine.recipe, numbers.checkpoint.config), engine.recipe.kv_cache
    if precisions.lossless and cache == "fp32" and numbers.checkpoint is engine.checkpoint:
        return reference
    return EagerModel(
        numbers.checkpoint,
        None if precisions.lossless else RecipeValues(numbers.rows, precisions),
        activation_rounding=precisions.rounding(engine.target.activation_rounding),
        input_scales=numbers.input_scales,
        kv_cache=cache,
        kv_scales=numbers.kv_scales,
    )


def _unsimulated(engine: EngineUnderTest) -> Unsimulated:
    """Why the engine of a calibrated recipe cannot be simulated from the checkpoint alone."""
    precisions = WeightPrecisions.from_recipe(engine.recipe, engine.checkpoint.config)
    why = "not run: the engine's quantization parameters are needed, give them with --qparams"
    return Unsimulated(why, precisions.rounding(engine.target.activation_rounding) is not None)


def _run(
    engine: EngineUnderTest,
    reference: Expectation,
    simulation: EagerModel | Unsimulated,
    inputs: ParityInputs,
    advance: Advance,
    seen: LogitSink | None = None,
) -> EngineResult:
    rows, roundoff = engine.limits.max_batch, engine.target.roundoff(engine.recipe)
    result = verify_engine(
        engine.open, reference, simulation, inputs, engine.recipe, rows, advance, seen, roundoff=roundoff
    )
    if not engine.stands_in or not isinstance(simulation, EagerModel):
        return result
    return replace(result, checks=(*result.checks, *_graph_checks(engine, simulation, inputs)))


def _graph_checks(engine: EngineUnderTest, simulation: EagerModel, inputs: ParityInputs) -> tuple[Check, ...]:
    """The graph of an engine that cannot run here beside its simulation, by another tool's runner and comparator."""
    from exporter.parity.polygraphy_check import polygraphy_checks
    from targets.tensorrt.engine_index import EngineIndex
    from targets.tensorrt.file_names import MODEL

    bf16 = engine.target.roundoff(engine.recipe) > FP16_ROUNDOFF
    limit = None if simulation.rounds_activations else CHAINED_BF16 if bf16 else SIMULATION_COARSE
    index = EngineIndex.read(engine.directory)
    return polygraphy_checks(engine.directory / MODEL, simulation, inputs, index, limit, engine.threads)


def _simulated(
    engine: EngineUnderTest, reference: Expectation, simulation: EagerModel, inputs: ParityInputs, advance: Advance
) -> tuple[StageResult, ...]:
    """What the engine would say, by its simulation, held to eager's limits; nothing where it is eager itself."""
    if simulation is reference.model:
        return ()
    rounded = expect(simulation, inputs, advance)
    scored = scored_positions(inputs)
    head = slice(0, len(reference.final) - len(scored[-1].positions))
    metrics = compare_logits(
        columns(reference.model, reference.final[head]),
        columns(simulation, rounded.final[head]),
        targets(inputs, scored)[head],
    )
    limits = eager_limits(engine.recipe)
    errors = tuple(_recipe_errors(reference, rounded))
    checks = eager_checks(metrics, limits, "simulate", classifies=inputs.classifies)
    return (StageResult("simulate", checks, layer_errors=errors),)


def _recipe_errors(reference: Expectation, simulation: Expectation) -> list[float]:
    """Relative L2 of the simulation's residual stream to eager's, in the simulation's basis, at every boundary."""
    turned = residual_basis(simulation.model.checkpoint)
    pairs = zip(reference.probe, simulation.probe, strict=True)
    return [relative_l2_error(turned(exact), rounded) for exact, rounded in pairs]


def _report(
    engine: EngineUnderTest,
    inputs: ParityInputs,
    stages: StageResults | None,
    result: EngineResult | None = None,
    recipe_errors: list[float] | None = None,
    not_run: str = "",
) -> VerifyReport:
    shown: tuple[StageResult, ...] = stages.stages if stages else ()
    if recipe_errors:
        shown = (*shown, StageResult("quantize", layer_errors=tuple(recipe_errors)))
    if result:
        shown = (*shown, result.stage)
    failed = next((stage for stage in shown if not stage.passed), None)
    checks = result.checks if result else (failed.checks if failed else shown[-1].checks)
    return VerifyReport(
        target=engine.target.name,
        recipe=engine.recipe.name,
        perplexity_reference=result.metrics.perplexity_reference if result else np.nan,
        perplexity_engine=result.metrics.perplexity if result else np.nan,
        checks=checks,
        proof=_proof(engine, stages, result, not_run),
        stages=shown,
        first_divergence=_first(stages, result, recipe_errors),
        positions=result.metrics.positions if result else 0,
        facts=_facts(engine, inputs) | ({"engine_not_run": not_run} if not_run else {}),
        is_checkpoint=result is not None and result.is_checkpoint,
    )


def _proof(engine: EngineUnderTest, stages: StageResults | None, result: EngineResult | None, not_run: str) -> Proof:
    builder = engine.built_by or built_by(engine.target)
    simulated = None if result is None or result.unsimulated else result.faithful
    graphs = stages.passed if stages else None
    if result is not None and result.is_checkpoint:
        words = (
            f"built by {builder}; its files were read back, decoded and run by the eager model; no server has loaded it"
        )
        return Proof(graphs, builder, None, simulated, None, words)
    if not_run:
        instead = ", ".join(sorted(engine.ran)) or "its simulation"
        words = f"built by {builder}; checked instead: {instead}; the engine was not run: {not_run}"
        return Proof(graphs, builder, None, simulated, True if result else None, words)
    if result is None:
        return Proof(graphs, builder, None, None, None, f"built by {builder}; not run: a stage before it failed")
    return Proof(graphs, builder, True, simulated, None, f"built by {builder} and run here")


def _first(
    stages: StageResults | None, result: EngineResult | None, recipe_errors: list[float] | None
) -> Divergence | None:
    """Of the earliest stage. An engine that equals its simulation and still misses eager's limits lost it to the
    recipe: the layer that adds most to the error is named."""
    if stages and stages.first_divergence:
        return stages.first_divergence
    if recipe_errors:
        layer = int(np.argmax(np.diff(np.square(recipe_errors))))
        note = "the engine equals its simulation: the recipe loses too much, most of it in this layer"
        return Divergence("quantize", layer, None, recipe_errors[layer + 1], note=note)
    return result.stage.divergence if result else None


def _facts(engine: EngineUnderTest, inputs: ParityInputs) -> dict[str, Any]:
    prompts = {"prompts": len(inputs.main_positions), "longest_prompt": inputs.main_length}
    generated = {"prefill_tokens": inputs.prefill, "decode_steps": inputs.decode}
    return {
        **(prompts if inputs.classifies else generated),
        "ragged_lengths": list(inputs.ragged_prompts),
        "longest_row": len(inputs.long_row),
        "max_batch": engine.limits.max_batch,
        "text": engine.text.name if engine.text else "built-in sample",
    }


def _part(progress: Progress, start: float, stop: float) -> Advance:
    """Progress within a part of the whole."""
    return lambda fraction, detail: progress.advance(start + (stop - start) * fraction, detail)
