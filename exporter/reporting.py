"""Writing the HTML report of a build or a verification, outside the artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.core.errors import InputError, ParityError

if TYPE_CHECKING:
    from exporter.artifact.manifest import Manifest
    from exporter.inspection import Inspection
    from exporter.parity.report import VerifyReport
    from exporter.pipeline import BuildOutcome


def check_report_path(report: Path | None) -> None:
    """Refuse a report that could not be written, before the work is done."""
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise InputError("output.report", f"the report cannot be written to {report}", "give a file in a directory")


def write_build_report(outcome: "BuildOutcome", path: Path | None) -> None:
    """The report of a finished build; nothing without a path. A build without parity has none to write."""
    if path is None:
        return
    if outcome.report is None:
        raise InputError("usage.report", "--report needs the parity checks", "leave --no-parity out")
    _write(outcome.report, _facts(outcome.path, outcome.manifest, outcome.digest), path)


def write_verify_report(report: "VerifyReport", seen: "Inspection", path: Path) -> None:
    """The report of `enginesmith verify`."""
    _write(report, _facts(seen.path, seen.manifest, seen.digest), path)


def write_failure_report(error: ParityError, path: Path | None) -> None:
    """The report of a build that a parity gate stopped: there is no artifact to describe."""
    if path is not None and error.verification is not None:
        _write(error.verification, {}, path)


def _facts(engine: Path, manifest: "Manifest", digest: str) -> dict[str, Any]:
    """What the page shows besides parity: sizes, coverage, and speed measured now.

    Memory is left out: this process has held the whole build.
    """
    from exporter.runtime.bench import bench_to_fit

    speed = bench_to_fit(engine, manifest.limits)
    del speed["peak_rss_bytes"]
    return {"digest": digest, "manifest": manifest.to_json(), "bench": speed}


def _write(report: "VerifyReport", facts: dict[str, Any], path: Path) -> None:
    from exporter.parity.html import write_html

    try:
        write_html(report, facts, path)
    except OSError as error:
        raise InputError("output.report", f"the report cannot be written to {path}: {error.strerror}", "") from error
