"""Activations of all calibration sequences: in memory up to a budget, beyond it in files of a work directory.

Files are read and written by position, never mapped: pages of a map count as resident memory of the process.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from exporter.core.disk import FULL
from exporter.core.errors import InputError


class Activations:
    """float32 [n, S, W], read and written by ranges of sequences."""

    def __init__(self, shape: tuple[int, int, int], path: Path | None) -> None:
        self.shape = shape
        self.path = path
        self._array = np.empty(shape, np.float32) if path is None else None
        self._file = None if path is None else _open(path)

    @property
    def nbytes(self) -> int:
        n, length, width = self.shape
        return 4 * n * length * width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Sequences [start, stop): the values themselves where they are in memory, a copy where not."""
        if self._array is not None:
            return self._array[start:stop]
        out = np.empty((stop - start, *self.shape[1:]), np.float32)
        view, position = out.view(np.uint8).reshape(-1).data, start * self._row_bytes
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], position + done)
            if count <= 0:
                raise InputError("work_dir.damaged", f"{self._name} ended early", "run the calibration again")
            done += count
        return out

    def write(self, start: int, values: np.ndarray) -> None:
        """Put values [m, S, W] at sequence `start`."""
        if self._array is not None:
            self._array[start : start + len(values)] = values
            return
        view = np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1).data
        done = 0
        try:
            while done < len(view):
                done += os.pwritev(self._descriptor, [view[done:]], start * self._row_bytes + done)
        except OSError as error:
            raise _disk_error(self._name, error) from error

    def save(self, path: Path, batch: int) -> None:
        """Make `path` hold the values, whole or not at all; a file of these activations is renamed to it."""
        if self.path is None:
            part = Activations(self.shape, path.with_name(f"{path.name}.part"))
            for start, stop in batches(self.shape[0], batch):
                part.write(start, self.read(start, stop))
            part.save(path, batch)
            part.close()
            return
        self.path.replace(path)
        self.path = path

    def close(self, *, remove: bool = False) -> None:
        """Give memory or the file back; `remove` deletes the file."""
        self._array = None
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if remove and self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def _row_bytes(self) -> int:
        return 4 * self.shape[1] * self.shape[2]

    @property
    def _descriptor(self) -> int:
        assert self._file is not None, "these activations are closed"
        return self._file

    @property
    def _name(self) -> str:
        return self.path.name if self.path else ""


class ActivationStore:
    """Makes and forgets activations; those that exist at one time take at most `budget` bytes of memory."""

    def __init__(self, directory: Path, budget: int) -> None:
        self.directory = directory
        self.budget = budget
        self._resident: dict[int, int] = {}
        self._made = 0

    def make(self, shape: tuple[int, int, int]) -> Activations:
        """New activations, in memory while the budget lasts. Their values are undefined."""
        size = 4 * shape[0] * shape[1] * shape[2]
        if sum(self._resident.values()) + size <= self.budget:
            made = Activations(shape, None)
            self._resident[id(made)] = size
            return made
        self._made += 1
        return Activations(shape, self.directory / f"activations-{os.getpid()}-{self._made}.f32")

    def drop(self, activations: Activations) -> None:
        """Forget activations and what they occupy."""
        self._resident.pop(id(activations), None)
        activations.close(remove=True)

    def open(self, path: Path, shape: tuple[int, int, int]) -> Activations:
        """Activations that an earlier run saved, in their file. Raises InputError if it has another size."""
        size = 4 * shape[0] * shape[1] * shape[2]
        found = path.stat().st_size if path.is_file() else -1
        if found != size:
            why = f"{path.name} has {found} bytes, {size} are needed" if found >= 0 else f"{path.name} is missing"
            raise InputError("work_dir.damaged", f"{why} in {path.parent}", "remove the work directory and start again")
        return Activations(shape, path)


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _disk_error(path.name, error) from error


def _disk_error(name: str, error: OSError) -> InputError:
    if error.errno in FULL:
        return InputError(
            "work_dir.full",
            f"no space left for activations ({name}): {error.strerror}",
            "free some disk space, choose another --work-dir, or calibrate with fewer tokens",
        )
    why = f"cannot write activations ({name}): {error.strerror or error}"
    return InputError("work_dir.write", why, "choose another --work-dir")
