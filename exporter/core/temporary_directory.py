"""A private directory beside an output, which never outlives its process for long.

It is called `.<name>.<purpose>-<pid>-<random>` and locked (flock) while its process lives, so that what a killed
process left behind is recognised, also across containers that share a disk but not their process ids.
"""

import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CALIBRATION = "calibration"
"""The purpose of a calibration's directories; the next build of the same output clears them as well."""
ENDING = re.compile(r"(?P<pid>\d+)-[0-9a-f]+")


@dataclass(frozen=True)
class TemporaryDirectory:
    """A directory of this process, and the descriptor that holds its lock."""

    path: Path
    descriptor: int

    def remove(self) -> None:
        """Remove what is at the path now, if anything, and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.descriptor)


def beside(final: Path) -> Path:
    """The path with its parent resolved and its own name kept, which may be a link that must be refused."""
    return final.parent.resolve() / final.name if final.name not in ("", "..") else final.resolve()


def create(final: Path, purpose: str, mode: int = 0o700) -> TemporaryDirectory:
    """A new, empty, locked directory beside `final`; those that dead processes left there go. Raises OSError."""
    remove_abandoned(final, purpose)
    final = beside(final)
    while True:
        path = final.parent / f".{final.name}.{purpose}-{os.getpid()}-{secrets.token_hex(6)}"
        path.mkdir(mode=mode)
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            # The clean-up of another process may have taken the directory before it was locked.
            if _lock(descriptor) is not False and path.exists():
                return TemporaryDirectory(path, descriptor)
            os.close(descriptor)


def remove_abandoned(final: Path, *purposes: str) -> None:
    """Remove the directories beside `final` whose processes are dead."""
    for purpose in purposes:
        for path in siblings(final, purpose):
            _remove_if_abandoned(path)


def siblings(final: Path, purpose: str) -> list[Path]:
    """The directories beside `final` that are named as `create` names them."""
    final = beside(final)
    prefix = f".{final.name}.{purpose}-"
    try:
        found = [path for path in final.parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return [path for path in found if ENDING.fullmatch(path.name.removeprefix(prefix)) and path.is_dir()]


def process_is_dead(path: Path) -> bool:
    """Whether no process on this machine has the id that is in the name."""
    try:
        os.kill(int(path.name.rsplit("-", 2)[-2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _lock(descriptor: int) -> bool | None:
    """Take the lock: True, False if its process lives, None where the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_if_abandoned(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        taken = _lock(descriptor)
        if taken or (taken is None and process_is_dead(path)):
            # The lock is held meanwhile: a process that has just made this directory must notice.
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
