"""The Python API: the same power as the command line, as typed functions. Imported lazily by `enginesmith`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from exporter.build_choices import AnyPath, BuildChoices, build_options
from exporter.calibration_request import CalibrationRequest
from exporter.core.progress import NoProgress, Progress, stage
from exporter.core.threads import check_threads
from exporter.inspection import Inspection
from exporter.options import BuildOptions
from exporter.plan import Plan, make_plan

if TYPE_CHECKING:
    from exporter.artifact.load import Artifact
    from exporter.calibrating import CalibrationOutcome
    from exporter.compare import Comparison
    from exporter.parity.report import VerifyReport
    from exporter.pipeline import BuildOutcome


def build(
    checkpoint: AnyPath,
    *,
    target: str,
    out: AnyPath,
    report: AnyPath | None = None,
    progress: Progress | None = None,
    **choices: Unpack[BuildChoices],
) -> "BuildOutcome":
    """Build a verified engine from a checkpoint directory; `BuildChoices` lists what may be chosen, all of it optional.

    A recipe that needs text takes `calibration`, a file to calibrate on (or a `CalibrationRequest`, which can say
    more), or `qparams`, what `calibrate` wrote.

    Raises InputError, UnsupportedError, ParityError (with its report) or BudgetError; then nothing
    is left under `out`.
    """
    options = build_options(Path(checkpoint), Path(out), target, choices)
    return build_with(options, report=_path(report), progress=progress)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


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


def plan(checkpoint: AnyPath, *, target: str, **choices: Unpack[BuildChoices]) -> Plan:
    """Forecast a build from the config alone; the choices are those of `build`. With `qparams` it says which matrices
    take their codes from that file."""
    return plan_with(build_options(Path(checkpoint), Path(), target, choices))


def plan_with(options: BuildOptions) -> Plan:
    """`plan`, from a ready options value."""
    return make_plan(options)


def verify(
    engine: AnyPath,
    *,
    against: AnyPath,
    text: AnyPath | None = None,
    qparams: AnyPath | None = None,
    report: AnyPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> "VerifyReport":
    """Prove a built engine equal to its checkpoint. Raises ParityError, with the report, if a gate fails.

    An engine built with quantization parameters is held to eager alone unless `qparams`, their file, is given.
    """
    from exporter.reporting import check_report_path, write_verify_report

    check_report_path(_path(report))
    artifact, result = _measure(engine, against, text, qparams, threads, progress or NoProgress())
    if report is not None:
        write_verify_report(result, artifact, Path(report))
    result.require_passed()
    return result


def measure(
    engine: AnyPath,
    *,
    against: AnyPath,
    text: AnyPath | None = None,
    qparams: AnyPath | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> "VerifyReport":
    """`verify` without the verdict: the report, passed or not."""
    return _measure(engine, against, text, qparams, threads, progress or NoProgress())[1]


def _measure(
    engine: AnyPath,
    against: AnyPath,
    text: AnyPath | None,
    qparams: AnyPath | None,
    threads: int,
    progress: Progress,
) -> "tuple[Artifact, VerifyReport]":
    """The artifact, opened once, and its report."""
    from exporter.artifact.load import open_artifact
    from exporter.verification import verify_engine_directory

    check_threads(threads)
    with stage(progress, "load"):
        artifact = open_artifact(Path(engine))
    with stage(progress, "verify"):
        report = verify_engine_directory(artifact, Path(against), _path(text), threads, progress, _path(qparams))
    return artifact, report


def inspect(engine: AnyPath, *, for_host: bool = False, expect_digest: str | None = None) -> Inspection:
    """Check an artifact's files (and, `for_host`, this host) and describe it; executes nothing of it."""
    from exporter.inspection import inspect_artifact

    return inspect_artifact(Path(engine), for_host=for_host, expect_digest=expect_digest)


def bench(
    engine: AnyPath,
    *,
    prompt_tokens: int = 128,
    new_tokens: int | None = None,
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
    engines: Sequence[AnyPath],
    *,
    against: AnyPath,
    text: AnyPath | None = None,
    threads: int = 0,
    report: AnyPath | None = None,
) -> "Comparison":
    """Engines of one checkpoint beside each other: size, quality against eager, speed, and divergence from one another.

    `report` writes an HTML page with the table and a plot of quality against size.
    """
    from exporter.compare import compare_engines
    from exporter.reporting import check_report_path, write_comparison

    check_report_path(_path(report))
    found = compare_engines([Path(e) for e in engines], Path(against), _path(text), threads)
    if report is not None:
        write_comparison(found, Path(report))
    return found


def calibrate(
    checkpoint: AnyPath,
    *,
    recipe: str,
    out: AnyPath,
    calibration: AnyPath | None = None,
    calibration_tokens: int | None = None,
    length: int | None = None,
    seed: int = 0,
    group_size: int | None = None,
    lm_head: str | None = None,
    embedding: str | None = None,
    kv_cache: str | None = None,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    max_kl: float | None = None,
    rotate: bool = False,
    work_dir: AnyPath | None = None,
    max_ram: int | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> "CalibrationOutcome":
    """Find a recipe's quantization parameters on text, and write them to one file that serves every target.

    `build(qparams=...)` takes the file. Raises InputError, UnsupportedError or BudgetError; nothing is left at `out`
    then, but `work_dir` keeps the finished layers, and the next call goes on from there.
    """
    from exporter.calibrating import CalibrationOptions, calibrate_with

    request = CalibrationRequest(
        text=_path(calibration),
        tokens=calibration_tokens,
        seed=seed,
        target_bits=target_bits,
        target_bytes=target_bytes,
        max_kl=max_kl,
        rotate=rotate,
        work_dir=_path(work_dir),
    )
    options = CalibrationOptions(
        checkpoint=Path(checkpoint),
        recipe=recipe,
        out=Path(out),
        request=request,
        length=length,
        group_size=group_size,
        lm_head=lm_head,
        embedding=embedding,
        kv_cache=kv_cache,
        max_ram=max_ram,
        threads=threads,
        force=force,
    )
    return calibrate_with(options, progress)


def targets() -> list[dict[str, Any]]:
    """Every target: whether it is usable here, why not, and how it takes each recipe."""
    from exporter.catalogue import list_targets

    return list_targets()


def recipes() -> list[dict[str, Any]]:
    """Every preset recipe with its precisions."""
    from exporter.catalogue import list_recipes

    return list_recipes()
