"""Builds plans, each in a process of its own.

TensorRT compiles for minutes inside one call: only a process can be stopped at once. It also gives back all of its
memory, keeps what it prints away from our output, and takes a crash of the compiler with it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from exporter.core import errors
from exporter.core.errors import EngineSmithError, UnsupportedError
from exporter.core.gpu_needs import LABELS
from targets.tensorrt.build_log import clean
from targets.tensorrt.build_progress import Report
from targets.tensorrt.plan_report import EngineRequest, PlanReport

WORKER = "targets.tensorrt.build_worker"
LAST_LINES = 60


def build_plan(model: Path, request: EngineRequest, out: Path, progress: Report) -> PlanReport:
    """Compile the graph `model` (weights beside it) into the plan `out`; `progress` gets fractions and phases.

    Raises UnsupportedError: `tensorrt.parser` and `tensorrt.builder` name the node that is refused, `tensorrt.crashed`
    tells how the compiler ended. On any exception, one raised by `progress` or Ctrl-C too, the compiler is ended at
    once and `out` does not exist.
    """
    job = {
        "model": model.name,
        "out": out.name if out.parent.absolute() == model.parent.absolute() else str(out.absolute()),
        "request": json.dumps(request.to_json()),
    }
    try:
        return _converse(job, model.parent, request, progress)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _converse(job: dict[str, str], folder: Path, request: EngineRequest, progress: Report) -> PlanReport:
    with tempfile.TemporaryFile() as printed, _worker(job, folder, printed) as (worker, messages):
        for line in messages:
            message = json.loads(line)
            if "progress" in message:
                progress(*message["progress"])
            elif "report" in message:
                return PlanReport.from_json(message["report"])
            elif "error" in message:
                raise _error(message["error"])
            else:
                raise RuntimeError(f"the process that builds failed: {message['fault']}")
        raise _crashed(worker.wait(), printed, request)


@contextmanager
def _worker(job: dict[str, str], folder: Path, printed: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """The process, reading its job, and its messages; it is ended with the block, whatever it is doing."""
    receiving, sending = os.pipe()
    with os.fdopen(receiving, encoding="utf-8") as messages:
        try:
            worker = subprocess.Popen(
                # -P: what lies in the current directory is not imported.
                [sys.executable, "-P", "-m", WORKER, str(sending)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=[sending],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
            )
        finally:
            os.close(sending)
        try:
            _hand_over(worker, job)
            yield worker, messages
        finally:
            worker.kill()
            worker.wait()
            _close_quietly(worker.stdin)


def _hand_over(worker: subprocess.Popen[bytes], job: dict[str, str]) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        # It has ended already; the end of its messages tells.
        return


def _close_quietly(stream: IO[bytes] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except BrokenPipeError:
        return


def _error(data: dict[str, Any]) -> EngineSmithError:
    """The worker's error as it was raised there."""
    kinds = {kind.__name__: kind for kind in EngineSmithError.__subclasses__()}
    kind: type[EngineSmithError] = kinds.get(data["class"], errors.EngineSmithError)
    return kind(data["kind"], data["message"], data["remedy"])


def _crashed(status: int, printed: IO[bytes], request: EngineRequest) -> UnsupportedError:
    """A worker that ended without a word: killed for its memory, or the compiler crashed."""
    printed.seek(0)
    lines = printed.read().decode("utf-8", "replace").strip().splitlines()
    said = f": {clean(' / '.join(lines[-LAST_LINES:]))}" if lines else ""
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    message = f"the process that builds with {LABELS[request.device.toolkit]} {how}{said}"
    remedy = "signal 9: give the machine more memory, about four times the engine's weights; else report it"
    return UnsupportedError("tensorrt.crashed", message, remedy)
