"""The process that builds one plan: `python -m targets.tensorrt.build_worker FD`, started by targets.tensorrt.builder.

Its first line of standard input is the job as JSON; messages go as JSON lines to the file descriptor FD: `progress`
[fraction, detail], then `report`, `error`, or for a fault of our own `fault`. It ends as soon as its standard input
does, so it never outlives its parent.
"""

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TextIO

from exporter.core.errors import EngineSmithError
from targets.tensorrt.plan_build import build_here
from targets.tensorrt.plan_report import EngineRequest
from targets.tensorrt.toolkit import load_toolkit


def main() -> None:
    # Ctrl-C reaches every process of the terminal: the parent decides, by ending this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
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


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
