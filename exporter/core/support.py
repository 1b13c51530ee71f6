"""What a target says about a recipe or about itself, before any weight is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """`level` is `native`, `emulated` (runs, but computes in another precision) or `refused`."""

    level: str
    why: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level not in ("native", "emulated", "refused"):
            raise ValueError(f"unknown support level {self.level!r}")

    @property
    def usable(self) -> bool:
        return self.level != "refused"
