"""TensorRT's nested phases as one fraction, and the way to stop a build."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Report = Callable[[float, str], None]


@dataclass
class Phase:
    """`done` of `steps` steps are complete; the current one may be a phase of its own, whose parent this is."""

    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Follows phases that begin and end in any order, and reports a fraction that never falls.

    After `report` has raised, the build is stopped, and `error` holds what was raised: an exception must not travel
    through TensorRT's own frames.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.phases: dict[str, Phase] = {}
        self.fraction = 0.0
        self.error: BaseException | None = None

    def begin(self, name: str, parent: str | None, steps: int) -> None:
        self.phases[name] = Phase(parent, max(1, steps))

    def step(self, name: str, number: int) -> bool:
        """Whether to go on."""
        if name in self.phases:
            self.phases[name].done = max(self.phases[name].done, number + 1)
        try:
            if self.error is None and (now := self._now(name)) > self.fraction:
                self.fraction = now
                self.report(now, name)
        except BaseException as error:
            self.error = error
        return self.error is None

    def end(self, name: str) -> None:
        self.phases.pop(name, None)

    def _now(self, name: str) -> float:
        """How far the whole is: the fraction of a phase fills one step of its parent."""
        fraction, current = 0.0, self.phases.get(name)
        while current is not None:
            fraction = min(1.0, (current.done + fraction) / current.steps)
            current = self.phases.get(current.parent) if current.parent else None
        return fraction


def make_monitor(module: Any, progress: BuildProgress) -> Any:
    """A progress monitor of a TensorRT module; the caller keeps it as long as the builder's configuration."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.begin(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.end(phase_name)

    return Monitor()
