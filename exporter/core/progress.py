"""Progress as the stages report it; how it is shown is the command line's business."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives what a stage does. Stages call `advance` with the fraction of their own work done."""

    def begin(self, stage: str) -> None:
        """A stage starts."""

    def advance(self, fraction: float, detail: str = "") -> None:
        """The current stage is at `fraction` (0 to 1); `detail` names what is in hand."""

    def end(self) -> None:
        """The current stage is complete."""


class NoProgress:
    """Shows nothing."""

    def begin(self, stage: str) -> None: ...

    def advance(self, fraction: float, detail: str = "") -> None: ...

    def end(self) -> None: ...


class PartOfStage:
    """Progress of work that is a part of a stage, from `start` to `stop` of it."""

    def __init__(self, progress: Progress, start: float, stop: float) -> None:
        self._progress, self._start, self._stop = progress, start, stop

    def begin(self, stage: str) -> None: ...

    def advance(self, fraction: float, detail: str = "") -> None:
        self._progress.advance(self._start + (self._stop - self._start) * fraction, detail)

    def end(self) -> None: ...


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[Progress]:
    """One stage as a `with` block; `end` is reported only if it succeeds."""
    progress.begin(name)
    yield progress
    progress.end()
