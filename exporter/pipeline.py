"""The whole data flow of a build on one screen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.coverage import Coverage, coverage, gate
from calibration.presets import load_recipe
from exporter.artifact.manifest import Manifest, write_manifest
from exporter.artifact.staging import staged_directory
from exporter.artifact.tokenizer_files import TokenizerFiles, read_tokenizer
from exporter.core.canonical import CanonicalModel
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import UnsupportedError
from exporter.core.progress import NoProgress, Progress, stage
from exporter.core.recipe import Recipe
from exporter.memory import check_peak
from exporter.options import BuildOptions
from exporter.plan import check_memory_budget
from targets.base import BuildResult, BuildSource, Limits, Target
from targets.registry import get_target

if TYPE_CHECKING:
    from exporter.parity.report import VerifyReport


@dataclass(frozen=True)
class Job:
    """A build whose feasibility was settled from the config alone, before any weight was read."""

    options: BuildOptions
    target: Target
    config: ModelConfig
    recipe: Recipe
    limits: Limits
    coverage: Coverage


@dataclass(frozen=True)
class BuildOutcome:
    """A finished build: where it is, its digest, and what was proven. `report` is None with `--no-parity`."""

    path: Path
    digest: str
    manifest: Manifest
    coverage: Coverage
    report: "VerifyReport | None"


def prepare(options: BuildOptions) -> Job:
    """Settle target, recipe, limits and coverage; raises before any weight is read."""
    target = get_target(options.target)
    config = ModelConfig.from_directory(options.checkpoint)
    recipe = load_recipe(
        options.recipe,
        group_size=options.group_size,
        lm_head=options.lm_head,
        embedding=options.embedding,
        kv_cache=options.kv_cache,
    )
    for support in (target.supports(config, recipe), target.probe()):
        if not support.usable:
            raise UnsupportedError(f"target.{target.name}", support.why, support.remedy)
    covered = coverage(config, recipe)
    gate(covered, options.min_coverage)
    job = Job(options, target, config, recipe, Limits(options.max_batch, options.sequence_limit(config)), covered)
    check_memory_budget(job)
    return job


def build(options: BuildOptions, progress: Progress | None = None) -> BuildOutcome:
    """Checkpoint in, verified artifact out; nothing appears under `options.out` unless every gate passes."""
    progress = progress or NoProgress()
    with staged_directory(options.out, options.force, source=options.checkpoint) as staging:
        with stage(progress, "check"):
            job = prepare(options)
            checkpoint = Checkpoint.open(options.checkpoint, job.config)
            tokenizer = read_tokenizer(options.checkpoint, job.config)
        with stage(progress, "trace"):
            traced = _trace(job)
        with stage(progress, "fuse"):
            fused = _fuse(traced, job)
        with stage(progress, "quantize"):
            quantized = _quantize(fused, job)
        with stage(progress, "compile"):
            source = _build_source(job, checkpoint, quantized)
            result = job.target.build(source, staging, progress)
            tokenizer.write(staging)
            check_peak(options.max_ram, "compile")
        with stage(progress, "verify"):
            report = _verify(job, source, traced, fused, staging, result, progress) if options.parity else None
            check_peak(options.max_ram, "verify")
        with stage(progress, "package"):
            manifest, digest = _package(job, checkpoint, tokenizer, result, report, staging)
    return BuildOutcome(options.out, digest, manifest, job.coverage, report)
