"""The Python API: the same power as the command line, as typed functions. Imported lazily by `enginesmith`."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.core.device import DeviceOptions
from exporter.core.progress import NoProgress, Progress, stage
from exporter.core.threads import check_threads
from exporter.inspection import Inspection
from exporter.options import BuildOptions
from exporter.plan import Plan, make_plan

if TYPE_CHECKING:
    from exporter.artifact.load import Artifact
    from exporter.parity.report import VerifyReport
    from exporter.pipeline import BuildOutcome

AnyPath = str | PathLike[str]


def build(
    checkpoint: AnyPath,
    *,
    target: str,
    out: AnyPath,
    recipe: str = "fp32",
    force: bool = False,
    tracer: str = "torch-export",
    max_seq_len: int | None = None,
    max_batch: int = 4,
    group_size: int | None = None,
    lm_head: str | None = None,
    embedding: str | None = None,
    kv_cache: str | None = None,
    min_coverage: float = 1.0,
    threads: int = 0,
    max_ram: int | None = None,
    parity: bool = True,
    text: AnyPath | None = None,
    device: str | None = None,
    mtriple: str | None = None,
    mcpu: str | None = None,
    mattr: Sequence[str] = (),
    tune_minutes: float = 0.0,
    tuning: AnyPath | None = None,
    report: AnyPath | None = None,
    progress: Progress | None = None,
) -> "BuildOutcome":
    """Build a verified engine from a checkpoint directory; see `BuildOptions` for the options.

    Raises InputError, UnsupportedError, ParityError (with its report) or BudgetError; then nothing
    is left under `out`.
    """
    options = BuildOptions(
        checkpoint=Path(checkpoint),
        out=Path(out),
        target=target,
        recipe=recipe,
        force=force,
        tracer=tracer,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        group_size=group_size,
        lm_head=lm_head,
        embedding=embedding,
        kv_cache=kv_cache,
        min_coverage=min_coverage,
        threads=threads,
        max_ram=max_ram,
        parity=parity,
        text=Path(text) if text is not None else None,
        device=DeviceOptions(device, mtriple, mcpu, tuple(mattr), tune_minutes, Path(tuning) if tuning else None),
    )
    return build_with(options, report=Path(report) if report is not None else None, progress=progress)


def build_with(
    options: BuildOptions, *, report: Path | None = None, progress: Progress | None = None
) -> "BuildOutcome":
    """`build`, from a ready options value. The HTML report is written also when a parity gate fails."""
    from exporter.core.errors import InputError, ParityError
    from exporter.pipeline import build as run_build
    from exporter.reporting import check_report_path, write_build_report, write_failure_report

    check_report_path(report)
    if report is not None and not options.parity:
        raise InputError("usage.report", "--report needs the parity checks", "leave --no-parity out")
    try:
        outcome = run_build(options, progress)
    except ParityError as error:
        write_failure_report(error, report)
        raise
    write_build_report(outcome, report)
    return outcome


def plan(
    checkpoint: AnyPath,
    *,
    target: str,
    recipe: str = "fp32",
    max_seq_len: int | None = None,
    max_batch: int = 4,
    group_size: int | None = None,
    lm_head: str | None = None,
    embedding: str | None = None,
    kv_cache: str | None = None,
    min_coverage: float = 1.0,
    parity: bool = True,
    device: str | None = None,
    mtriple: str | None = None,
    mcpu: str | None = None,
    mattr: Sequence[str] = (),
) -> Plan:
    """Forecast a build from the config alone; the options are those of `build`."""
    return plan_with(
        BuildOptions(
            checkpoint=Path(checkpoint),
            out=Path(),
            target=target,
            recipe=recipe,
            max_seq_len=max_seq_len,
            max_batch=max_batch,
            group_size=group_size,
            lm_head=lm_head,
            embedding=embedding,
            kv_cache=kv_cache,
            min_coverage=min_coverage,
            parity=parity,
            device=DeviceOptions(device, mtriple, mcpu, tuple(mattr)),
        )
    )


def plan_with(options: BuildOptions) -> Plan:
    """`plan`, from a ready options value."""
    return make_plan(options)


def verify(
    engine: AnyPath,
    *,
    against: AnyPath,
    text: AnyPath | None = None,
    report: AnyPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> "VerifyReport":
    """Prove a built engine equal to its checkpoint. Raises ParityError, with the report, if a gate fails."""
    from exporter.reporting import check_report_path, write_verify_report

    check_report_path(Path(report) if report is not None else None)
    artifact, result = _measure(engine, against, text, threads, progress or NoProgress())
    if report is not None:
        write_verify_report(result, artifact, Path(report))
    result.require_passed()
    return result


def measure(
    engine: AnyPath,
    *,
    against: AnyPath,
    text: AnyPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> "VerifyReport":
    """`verify` without the verdict: the report, passed or not."""
    return _measure(engine, against, text, threads, progress or NoProgress())[1]


def _measure(
    engine: AnyPath, against: AnyPath, text: AnyPath | None, threads: int, progress: Progress
) -> "tuple[Artifact, VerifyReport]":
    """The artifact, opened once, and its report."""
    from exporter.artifact.load import open_artifact
    from exporter.verification import verify_engine_directory

    check_threads(threads)
    with stage(progress, "load"):
        artifact = open_artifact(Path(engine))
    with stage(progress, "verify"):
        report = verify_engine_directory(artifact, Path(against), Path(text) if text else None, threads, progress)
    return artifact, report


def inspect(engine: AnyPath, *, for_host: bool = False, expect_digest: str | None = None) -> Inspection:
    """Check an artifact's files (and, `for_host`, this host) and describe it; executes nothing of it."""
    from exporter.inspection import inspect_artifact

    return inspect_artifact(Path(engine), for_host=for_host, expect_digest=expect_digest)


def bench(
    engine: AnyPath,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    context: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure an engine: the `bench` object of the contract."""
    from exporter.runtime.bench import bench as run_bench

    return run_bench(
        Path(engine), prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, context=context, threads=threads
    )


def compare(
    engines: list[AnyPath], *, against: AnyPath, text: AnyPath | None = None, threads: int = 0
) -> list[dict[str, Any]]:
    """One row of size, quality and speed per engine."""
    from exporter.compare import compare_engines

    return compare_engines([Path(e) for e in engines], Path(against), Path(text) if text else None, threads)


def targets() -> list[dict[str, Any]]:
    """Every target: whether it is usable here, why not, and how it takes each recipe."""
    from exporter.catalogue import list_targets

    return list_targets()


def recipes() -> list[dict[str, Any]]:
    """Every preset recipe with its precisions."""
    from exporter.catalogue import list_recipes

    return list_recipes()
