"""Parameters of the kernels that depend on a CPU's caches, and the file that keeps what was found for them.

A file belongs to one CPU model and profile; it holds one entry for each shape of model that was tuned.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.disk import output_errors
from exporter.core.errors import InputError
from exporter.core.recipe import Recipe
from exporter.core.strict_json import parse_json

FORMAT = 1
LINE = 64
# The smallest and largest value of each parameter, and what it is a multiple of.
RANGES = {
    "prefetch": (0, 65536, LINE),
    "tile_rows": (0, 8, 1),
    "chunk": (32, 512, 32),
    "queries": (24, 1024, 8),
}


@dataclass(frozen=True)
class Tuning:
    """What kernels are generated with.

    `prefetch`: bytes of the weight stream asked for ahead (4 to 12 KB make little difference).
    `tile_rows`: rows of a tile of integer products, 0 for the profile's own. `chunk`: tokens of one step of a prompt
    at most. `queries`: rows of a task of prompt attention.
    Raises InputError when a value is out of range.
    """

    prefetch: int = 6144
    tile_rows: int = 0
    chunk: int = 512
    queries: int = 192

    def __post_init__(self) -> None:
        for name, (least, most, step) in RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most or value % step:
                raise InputError(
                    "tuning.value",
                    f"{name} is {value!r}",
                    f"a multiple of {step} from {least} to {most}",
                )


DEFAULT = Tuning()


def shape_key(config: ModelConfig, recipe: Recipe) -> str:
    """What the best parameters of a CPU depend on: sizes of a layer, precision, cache."""
    return (
        f"{config.hidden_size}x{config.intermediate_size}, {config.num_heads}/{config.num_kv_heads} heads of "
        f"{config.head_dim}, {recipe.linear.describe()}, {recipe.kv_cache} cache"
    )


@dataclass(frozen=True)
class TuningFile:
    """What was found on CPUs of model `cpu` for kernels of `profile`, by `shape_key`."""

    profile: str
    cpu: str
    found: dict[str, Tuning] = field(default_factory=dict)

    def check(self, profile: str, cpu: str | None) -> None:
        """Raises InputError when the file is for another profile or CPU model; None stands for any CPU."""
        if self.profile != profile:
            raise InputError(
                "tuning.profile",
                f"the tuning results are for profile {self.profile}, this build is for {profile}",
                "name a file of that profile, or leave --tuning out",
            )
        if cpu is not None and self.cpu != cpu:
            raise InputError(
                "tuning.cpu",
                f"the tuning results come from a {self.cpu!r}, this is a {cpu!r}",
                "tune on this machine with --tune MINUTES and another file, or leave --tuning out",
            )

    def with_result(self, key: str, tuning: Tuning) -> "TuningFile":
        return TuningFile(self.profile, self.cpu, {**self.found, key: tuning})

    def write(self, path: Path) -> None:
        """One JSON object; the same results give the same bytes. Raises InputError `output.write`, `output.full`."""
        found = {key: asdict(self.found[key]) for key in sorted(self.found)}
        text = json.dumps({"format": FORMAT, "profile": self.profile, "cpu": self.cpu, "found": found}, indent=1)
        part = path.with_name(f".{path.name}.part")
        try:
            with output_errors(path):
                part.write_text(text + "\n", encoding="utf-8")
                part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_tuning(path: Path) -> TuningFile:
    """A file that `write` wrote. Raises InputError `tuning.file` when it cannot be read or is something else."""
    try:
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("it is no object")
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, this version reads {FORMAT}")
        if not isinstance(data["profile"], str) or not isinstance(data["cpu"], str):
            raise ValueError("profile and cpu are no names")
        return TuningFile(data["profile"], data["cpu"], {key: _entry(value) for key, value in data["found"].items()})
    except OSError as error:
        raise InputError("tuning.file", f"cannot read {path}: {error.strerror or error}", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(
            "tuning.file", f"{path.name} holds no tuning results: {reason}", "name a file that --tune wrote"
        ) from error


def check_writable(path: Path) -> None:
    """Before minutes are spent on results for `path`. Raises InputError `tuning.unwritable`."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise InputError("tuning.unwritable", f"no file can be written at {path}", "name a file in a writable folder")


def _entry(value: dict[str, int]) -> Tuning:
    known = {each.name for each in fields(Tuning)}
    if set(value) != known:
        raise ValueError(f"an entry has {', '.join(sorted(value))}, expected {', '.join(sorted(known))}")
    return Tuning(**value)
