"""The work directory of a calibration: what finished layers found, and the activations that enter the next one.

A named directory outlives an interruption: the next run with the same checkpoint, recipe, data and options goes on
after the last finished layer and ends with the same bytes. It refuses to go on with anything else.

    binding.json         what the calibration is
    part-NNNN.qparams    one finished layer (the last number: the head), a file of quantization parameters itself
    hidden-NNNN.f32      the residual stream [n, S, H] that leaves layer NNNN; only the last one is kept
    recipe.json          what recipe `auto` chose
    activations-*.f32    what does not fit in memory, while it is needed
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.core.disk import output_errors
from exporter.core.errors import InputError
from exporter.core.temporary_directory import CALIBRATION, create, remove_abandoned

BINDING = "binding.json"


@dataclass(frozen=True)
class WorkDirectory:
    """The directory of one run. `resumable`: whether somebody named it, so that it may be used again."""

    path: Path
    resumable: bool

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:04}.qparams"

    def hidden(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:04}.f32"

    @property
    def chosen(self) -> Path:
        return self.path / "recipe.json"

    @property
    def finished(self) -> int:
        """Parts that an earlier run left, from the first on."""
        count = 0
        while self.part(count).is_file():
            count += 1
        return count

    def clear(self) -> None:
        """Remove everything of ours: the calibration is complete."""
        for pattern in ("part-*.qparams", "hidden-*.f32", "activations-*.f32*"):
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        for file in (self.chosen, self.path / BINDING):
            file.unlink(missing_ok=True)


@contextmanager
def work_directory(named: Path | None, out: Path, binding: Mapping[str, object]) -> Iterator[WorkDirectory]:
    """The named directory, locked and bound to this calibration, or a temporary one beside `out`.

    Temporary ones that killed calibrations of `out` left are removed.
    Raises InputError (`work_dir.other`, `work_dir.in_use`, `output.write`).
    """
    if named is None:
        with output_errors(out):
            temporary = create(out, CALIBRATION)
        try:
            yield WorkDirectory(temporary.path, resumable=False)
        finally:
            temporary.remove()
        return
    remove_abandoned(out, CALIBRATION)
    with output_errors(named):
        named.mkdir(parents=True, exist_ok=True)
        lock = (named / BINDING).open("a+", encoding="utf-8")
    with lock:
        _lock(named, lock.fileno())
        with output_errors(named):
            _bind(named, binding)
        _remove_activations(named)
        try:
            yield WorkDirectory(named, resumable=True)
        finally:
            _remove_activations(named)


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            "work_dir.in_use", f"another calibration works in {path}", "wait for it, or choose another --work-dir"
        ) from None


def _bind(path: Path, binding: Mapping[str, object]) -> None:
    """Note what the directory is for; refuse one that is for something else."""
    text = json.dumps(binding, sort_keys=True, indent=1) + "\n"
    file = path / BINDING
    found = file.read_text(encoding="utf-8", errors="replace")
    if not found:
        file.write_text(text, encoding="utf-8")
    elif found != text:
        raise InputError("work_dir.other", _difference(path, found, binding), "remove it, or choose another --work-dir")


def _difference(path: Path, found: str, binding: Mapping[str, object]) -> str:
    try:
        before = json.loads(found)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return f"{path / BINDING} does not belong to a calibration"
    now = json.loads(json.dumps(binding))
    other = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"{path} holds a calibration with other {', '.join(other)}"


def _remove_activations(path: Path) -> None:
    for file in path.glob("activations-*.f32*"):
        file.unlink(missing_ok=True)
