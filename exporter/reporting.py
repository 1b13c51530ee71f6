"""Writing the HTML report of a build or a verification, outside the artifact."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact.load import Artifact
from exporter.core.disk import FULL, full
from exporter.core.errors import InputError, ParityError

if TYPE_CHECKING:
    from exporter.compare import Comparison
    from exporter.parity.report import VerifyReport
    from exporter.pipeline import BuildOutcome


def check_report_path(report: Path | None) -> None:
    """Refuse a report that could not be written, before the work is done."""
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise InputError("output.report", f"the report cannot be written to {report}", "give a file in a directory")


def write_build_report(outcome: "BuildOutcome", path: Path | None) -> None:
    """The report of a finished build; nothing without a path."""
    if path is None or outcome.report is None:
        return
    artifact = Artifact(outcome.path, outcome.manifest, outcome.digest)
    _write(outcome.report, _facts(artifact, ran=outcome.report.proof.engine_run is True), path)


def write_verify_report(report: "VerifyReport", artifact: Artifact, path: Path) -> None:
    """The report of `enginesmith verify`."""
    _write(report, _facts(artifact, ran=True), path)


def write_failure_report(error: ParityError, path: Path | None) -> None:
    """The report of a build that a parity gate stopped: there is no artifact to describe."""
    if path is not None and error.verification is not None:
        _write(error.verification, {}, path)


def write_comparison(found: "Comparison", path: Path) -> None:
    """The page of `enginesmith compare`."""
    from exporter.parity.comparison_page import render_comparison

    with _report_errors(path):
        path.write_text(render_comparison(found.to_json()), encoding="utf-8")


def _facts(artifact: Artifact, *, ran: bool) -> dict[str, Any]:
    """What the page shows besides parity: sizes, coverage, and speed measured now where the engine runs here.

    Memory is left out: this process has held the whole build. So is the time to load: the files are checked already.
    """
    facts = {"digest": artifact.digest, "manifest": artifact.manifest.to_json()}
    if not ran:
        return facts
    from exporter.runtime.bench import bench_to_fit

    speed = bench_to_fit(artifact)
    for unfair in ("peak_rss_bytes", "load_seconds"):
        del speed[unfair]
    return {**facts, "bench": speed}


def _write(report: "VerifyReport", facts: dict[str, Any], path: Path) -> None:
    from exporter.parity.html import write_html

    with _report_errors(path):
        write_html(report, facts, path)


@contextmanager
def _report_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(path, error) from error
        raise InputError(
            "output.report", f"the report cannot be written to {path}: {error.strerror}", "give another file"
        ) from error
