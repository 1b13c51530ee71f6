"""The command line's contract on output: JSON alone on stdout, people on stderr, one exit code per cause."""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from exporter.core.errors import BudgetError, EngineSmithError, InputError, ParityError

INTERRUPTED = 130
INTERRUPTION = {"exit_code": INTERRUPTED, "kind": "interrupted", "message": "interrupted", "remedy": ""}


class Output:
    """Where results go. With `--json`, nothing but one object may reach stdout, whatever libraries print."""

    def __init__(self, arguments: list[str]) -> None:
        self.json = "--json" in arguments
        self.debug = "--debug" in arguments
        self.stdout = sys.stdout
        if self.json:
            sys.stdout.flush()
            self.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
            os.dup2(2, 1)

    def result(self, value: dict[str, Any], text: str) -> None:
        """Print the JSON object, or the text for people."""
        self._print((json.dumps(value, allow_nan=False) if self.json else text) + "\n")

    def stream(self, text: str) -> None:
        """Text as it comes (a generated answer); silent with `--json`."""
        if not self.json:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, end="", file=self.stdout, flush=True)
        except OSError as error:
            # What is still buffered must not fail again when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has what it wanted: `| head`
                raise SystemExit(0) from None
            why = f"the result cannot be written to standard output: {error.strerror}"
            raise InputError("output.stdout", why, "free some space, or send the output elsewhere") from error

    def failure(self, error: EngineSmithError) -> int:
        """Report an error in both forms; returns its exit code."""
        if self.json:
            report = error.report if isinstance(error, ParityError) else {}
            with suppress(InputError):  # standard output is full: standard error and the exit code still tell
                self.result({**report, "error": error.to_json()}, "")
        print(f"error: {error.message}", file=sys.stderr)
        if error.remedy:
            print(f"  what to do: {error.remedy}", file=sys.stderr)
        return error.exit_code


class UnexpectedError(EngineSmithError):
    """A fault of enginesmith itself: nothing the contract has a code for."""

    exit_code = 1


class UsageError(EngineSmithError):
    """The command line could not be understood."""

    exit_code = 2


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that everything half-written is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_guarded(output: Output, work: Callable[[], None]) -> int:
    """Run a command and turn every way it can end into the contract's exit code."""
    try:
        with interruptible():
            work()
        return 0
    except EngineSmithError as error:
        if output.debug:
            traceback.print_exc()
        return output.failure(error)
    except KeyboardInterrupt:
        if output.json:
            output.result({"error": INTERRUPTION}, "")
        print("interrupted; nothing was left behind", file=sys.stderr)
        return INTERRUPTED
    except MemoryError:
        return output.failure(
            BudgetError("memory.exhausted", "out of memory", "see `enginesmith plan` for what is needed")
        )
    except Exception as error:
        if output.debug:
            traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        return output.failure(
            UnexpectedError("internal", f"unexpected fault: {message}", "run again with --debug and report the trace")
        )
