"""Which machine an engine is asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

from exporter.core.errors import InputError

MAX_TUNE_MINUTES = 7 * 24 * 60


@dataclass(frozen=True)
class DeviceOptions:
    """The machine an engine is for, as asked: a name of `Target.devices`, or LLVM's triple, CPU and features
    (`+dotprod`); nothing means this machine. `tune_minutes` searches kernel parameters that long, beginning from,
    and writing to, the file `tuning` where it is given. Targets that know no devices take none of it.
    """

    device: str | None = None
    mtriple: str | None = None
    mcpu: str | None = None
    mattr: tuple[str, ...] = ()
    tune_minutes: float = 0.0
    tuning: Path | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tune_minutes) and 0 <= self.tune_minutes <= MAX_TUNE_MINUTES):
            raise InputError("usage.tune", f"--tune is {self.tune_minutes}", f"give 0 to {MAX_TUNE_MINUTES} minutes")
        if self.device is not None and (self.mtriple or self.mcpu or self.mattr):
            raise InputError(
                "usage.device",
                f"--device {self.device} is given beside --mtriple, --mcpu or --mattr",
                "give one of them",
            )

    @property
    def given(self) -> list[str]:
        """The command line's options that were given."""
        values = (
            ("--device", self.device),
            ("--mtriple", self.mtriple),
            ("--mcpu", self.mcpu),
            ("--mattr", self.mattr),
            ("--tune", self.tune_minutes),
            ("--tuning", self.tuning),
        )
        return [flag for flag, value in values if value]


THIS_MACHINE = DeviceOptions()


def parse_features(text: str | None) -> tuple[str, ...]:
    """`+dotprod,+i8mm` -> its parts; None and blanks are none."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
