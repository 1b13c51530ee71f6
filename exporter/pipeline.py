"""The whole data flow of a build on one screen; each stage is a function from one value to the next."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.coverage import Coverage, coverage, prospective
from calibration.qparams import QParams
from exporter.artifact.calibration_record import record_of
from exporter.artifact.host import check_host
from exporter.artifact.manifest import Manifest, PrecisionTable, Source, write_manifest
from exporter.artifact.staging import check_output, staged_directory
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.core.canonical import CanonicalModel
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import UnsupportedError
from exporter.core.labelled import labelled, labelled_config
from exporter.core.machine import triple
from exporter.core.progress import NoProgress, Progress, stage
from exporter.core.recipe import Recipe
from exporter.core.task import GENERATE, Task
from exporter.core.traced import TracedModel
from exporter.handoff.files import write_handoff
from exporter.labels import LabelToken, named_labels
from exporter.memory import check_peak
from exporter.options import BuildOptions
from exporter.plan import built_config, check_memory_budget, first_blocker, open_parameters
from exporter.recipe_numbers import RecipeNumbers, calibrated_numbers, plain_numbers
from exporter.requested_recipe import requested_recipe
from exporter.requested_task import requested_task
from exporter.version import VERSION
from targets.base import BuildResult, BuildSource, Limits, Target, built_by
from targets.registry import get_target

if TYPE_CHECKING:
    from exporter.parity.report import VerifyReport


@dataclass(frozen=True)
class Job:
    """A build whose feasibility was settled from the config alone, before any weight was read.

    `source` is the checkpoint's architecture, `config` the one for the task: a classifier's head is smaller.
    """

    options: BuildOptions
    target: Target
    source: ModelConfig
    config: ModelConfig
    recipe: Recipe
    limits: Limits
    coverage: Coverage
    parameters: QParams | None = None
    task: Task = GENERATE


@dataclass(frozen=True)
class Graphs:
    """The model after each stage that works on graphs."""

    traced: TracedModel
    fused: CanonicalModel
    quantized: CanonicalModel


@dataclass(frozen=True)
class BuildOutcome:
    """A finished build: where it is, its digest, and what was proven. `report` is None with `--no-parity`; `labels`
    say which token stands for each label of a classifier."""

    path: Path
    digest: str
    manifest: Manifest
    coverage: Coverage
    report: "VerifyReport | None"
    labels: tuple[LabelToken, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `build --json` prints."""
        return {
            "path": str(self.path),
            "digest": self.digest,
            "target": self.manifest.target,
            "recipe": self.manifest.recipe_name,
            "engine_bytes": self.manifest.total_bytes,
            "labels": [asdict(label) for label in self.labels],
            "coverage": self.coverage.to_json(),
            "parity": self.manifest.parity,
            "proof": self.manifest.proof,
        }

    def describe(self) -> str:
        """The outcome for people."""
        size = f"{self.manifest.total_bytes / 1e6:,.1f} MB, {self.coverage.bits_per_weight:.2f} bits per weight"
        proven = self.report.describe() if self.report else "parity was not checked (--no-parity)"
        built = f"built {self.path}: {self.manifest.recipe_name} for {self.manifest.target}, {size}"
        return "\n".join((built, *(label.describe() for label in self.labels), proven))


def build(options: BuildOptions, progress: Progress | None = None) -> BuildOutcome:
    """Checkpoint in, verified artifact out; nothing appears under `options.out` unless every gate passes."""
    progress = progress or NoProgress()
    with stage(progress, "check"):
        check_output(options.out, options.force, options.checkpoint)
        job = prepare(options)
        original = Checkpoint.open(options.checkpoint, job.source)
        tokenizer = read_tokenizer(options.checkpoint, job.source)
        if job.parameters is not None:
            job.parameters.check(original)
        checkpoint = labelled(original, job.task)
    with staged_directory(options.out, options.force, options.checkpoint) as staging, ThreadPoolExecutor(1) as pool:
        source_digest = pool.submit(lambda: checkpoint.digest)
        if options.calibration.calibrates(job.recipe):
            with stage(progress, "calibrate"):
                job = calibrated_job(job, original, progress)
        numbers = recipe_numbers(job, checkpoint)
        graphs = make_graphs(job, numbers, progress)
        with stage(progress, "compile"):
            source = build_source(job, numbers, graphs.quantized)
            result = job.target.build(source, staging, progress)
            tokenizer.write(staging)
            check_peak(options.max_ram, "compile")
        report = _verify(job, checkpoint, numbers, graphs, staging, result, progress) if options.parity else None
        with stage(progress, "package"):
            manifest = _manifest(job, source_digest.result(), result, report)
            write_handoff(manifest, staging)
            manifest, digest = write_manifest(staging, manifest)
    labels = tuple(named_labels(options.checkpoint, job.task, job.source))
    return BuildOutcome(options.out, digest, manifest, job.coverage, report, labels)


def prepare(options: BuildOptions) -> Job:
    """Settle target, recipe, limits and coverage; raises before any weight is read."""
    target = get_target(options.target)
    source = ModelConfig.from_directory(options.checkpoint)
    limits = Limits(options.max_batch, options.sequence_limit(source))
    target.check_options(options.device, options.engine, limits)
    task = requested_task(options, source)
    parameters = open_parameters(options, source)
    recipe, config = requested_recipe(options, target, source, parameters), labelled_config(source, task)
    recipe = recipe if parameters else prospective(config, recipe)
    options.calibration.check_recipe(recipe, target.calibrated_caches)
    covered = coverage(built_config(config, recipe), recipe, target.matrix_bits)
    if blocker := first_blocker(options, target, config, recipe, covered, task):
        raise blocker
    options.calibration.check(recipe, target.calibrated_caches)
    if not (probe := target.probe()).usable:
        raise UnsupportedError(f"target.{target.name}", f"target {target.name}: {probe.why}", probe.remedy)
    check_memory_budget(options, config, recipe, covered, limits)
    return Job(options, target, source, config, recipe, limits, covered, parameters, task)


def calibrated_job(job: Job, checkpoint: Checkpoint, progress: Progress) -> Job:
    """The job with parameters found on the options' text, and the recipe as they settle it (`auto` chooses)."""
    from exporter.calibrating import calibrate_for_build

    parameters = calibrate_for_build(checkpoint, job.recipe, job.options, progress)
    check_peak(job.options.max_ram, "calibrate")
    target, recipe = job.target, parameters.recipe
    covered = coverage(built_config(job.config, recipe), recipe, target.matrix_bits)
    if blocker := first_blocker(job.options, target, job.config, recipe, covered, job.task):
        raise blocker
    return replace(job, recipe=recipe, coverage=covered, parameters=parameters)


def recipe_numbers(job: Job, checkpoint: Checkpoint) -> RecipeNumbers:
    """Where weights and scales come from; nothing is read yet but the scales."""
    if job.parameters is None:
        return plain_numbers(checkpoint, job.options.threads)
    return calibrated_numbers(checkpoint, job.recipe, job.parameters, job.target, job.options.threads)


def make_graphs(job: Job, numbers: RecipeNumbers, progress: Progress) -> Graphs:
    """Trace, fuse and apply the recipe; the checker runs on the result of both."""
    with stage(progress, "trace"):
        from exporter.trace.trace import trace

        traced = trace(job.config, job.options.tracer)
    with stage(progress, "fuse"):
        from exporter.passes.pipeline import fuse

        fused = fuse(traced, job.config, job.limits.max_seq_len).model
    with stage(progress, "quantize"):
        from calibration.insert_precision import apply_recipe
        from exporter.core.checker import check_canonical

        quantized = apply_recipe(fused, job.recipe, numbers.checkpoint.config, numbers.input_scales)
        check_canonical(quantized, numbers.checkpoint.config)
    return Graphs(traced, fused, quantized)


def build_source(job: Job, numbers: RecipeNumbers, quantized: CanonicalModel) -> BuildSource:
    """What the target builds from; weights are quantized when the target asks for their rows."""
    return BuildSource(
        numbers.checkpoint.config,
        job.recipe,
        quantized,
        numbers.checkpoint,
        numbers.rows,
        job.limits,
        job.options.device,
        numbers.kv_scales or None,
        numbers.input_scales,
        job.options.engine,
        job.task,
    )


def _verify(
    job: Job,
    checkpoint: Checkpoint,
    numbers: RecipeNumbers,
    graphs: Graphs,
    engine: Path,
    result: BuildResult,
    progress: Progress,
) -> "VerifyReport":
    from exporter.parity.verify import EngineUnderTest, verify_build

    options = job.options
    unfit = [found.message for found in check_host(result.triple or triple(), result.requirements)]
    not_run = "; ".join([result.not_run] if result.not_run else unfit)
    subject = EngineUnderTest(
        job.target,
        engine,
        checkpoint,
        job.recipe,
        job.limits,
        options.text,
        options.threads,
        built_by=result.built_by or "",
    )
    served = numbers.served(job.target, job.recipe, options.engine.format)
    with stage(progress, "verify"):
        report = verify_build(subject, graphs.traced, graphs.fused, graphs.quantized, served, progress, not_run)
        check_peak(job.options.max_ram, "verify")
    return report


def _manifest(job: Job, source_digest: str, result: BuildResult, report: "VerifyReport | None") -> Manifest:
    return Manifest(
        enginesmith=VERSION,
        source=Source(source_digest, job.source),
        recipe=job.recipe,
        coverage=PrecisionTable.from_json(job.coverage.to_json()),
        target=job.target.name,
        triple=result.triple or triple(),
        requirements=result.requirements,
        toolchain=result.toolchain,
        signature=result.signature,
        limits=job.limits,
        weights_bytes=result.weights_bytes,
        parity=report.to_json() if report else None,
        proof=report.proof.to_json() if report else _unproven(result.built_by or built_by(job.target)),
        calibration=record_of(job.parameters) if job.parameters else None,
        task=job.task,
        engine=result.report,
    )


def _unproven(built_by: str) -> dict[str, Any]:
    names = ("graph_parity", "engine_run", "simulation", "stand_in")
    words = f"built by {built_by}; nothing was proven (--no-parity)"
    return {"built_by": built_by, "statement": words, **dict.fromkeys(names)}
