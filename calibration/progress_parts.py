"""A part of a stage that reports as if it were the whole."""

from dataclasses import dataclass

from exporter.core.progress import Progress


@dataclass(frozen=True)
class PartOfStage:
    """Progress from `low` to `high` of the stage that `whole` shows; it begins and ends nothing."""

    whole: Progress
    low: float
    high: float

    def begin(self, stage: str) -> None: ...

    def advance(self, fraction: float, detail: str = "") -> None:
        self.whole.advance(self.low + (self.high - self.low) * fraction, detail)

    def end(self) -> None: ...
