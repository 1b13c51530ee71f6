"""The process that builds one plan: `python -m targets.tensorrt.build_worker FD`, started by targets.tensorrt.builder.

Its first line of standard input is the job as JSON; messages go as JSON lines to the file descriptor FD: `progress`
[fraction, detail], then `report`, `error`, or for a fault of our own `fault`. The kernel ends it with its parent.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TextIO

from exporter.core.errors import EngineSmithError
from targets.tensorrt.plan_build import build_here
from targets.tensorrt.plan_report import EngineRequest
from targets.tensorrt.toolkit import load_toolkit

WORKER = "targets.tensorrt.build_worker"
STEADY = "ENGINESMITH_STEADY"
ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches every process of the terminal: the parent decides, by ending this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as messages:
        try:
            _send(messages, report=_build(job, messages))
        except EngineSmithError as error:
            _send(messages, error={"class": type(error).__name__, **error.to_json()})
        except Exception:
            _send(messages, fault=traceback.format_exc())


def _build(job: dict[str, str], messages: TextIO) -> dict[str, object]:
    request = EngineRequest.from_json(json.loads(job["request"]))
    toolkit = load_toolkit(request.device.toolkit)

    def progress(fraction: float, detail: str) -> None:
        _send(messages, progress=[fraction, detail])

    return build_here(toolkit, Path(job["model"]), request, Path(job["out"]), progress).to_json()


def _send(messages: TextIO, **message: object) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


def _start_steadily() -> None:
    """Start over with fixed addresses and hashes: the compiler orders what it writes by them, and equal builds should
    give equal bytes. No thread is started either, and names are relative to the directory it is started in: both were
    seen to matter. It is not all that does: most plans of one graph are equal then, not every one.

    Where the system forbids it (a container's seccomp), the build goes on as it is.
    """
    if os.environ.get(STEADY) is not None:
        return
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    environment = {**os.environ, STEADY: "1", "PYTHONHASHSEED": "0"}
    os.execve(sys.executable, [sys.executable, "-P", "-m", WORKER, *sys.argv[1:]], environment)


if __name__ == "__main__":
    _start_steadily()
    main()
