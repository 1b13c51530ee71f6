"""An output directory that appears complete or not at all.

Everything is written to a private directory beside the final one, `.<name>.building-<pid>-<random>`,
and renamed at the end. The directory is locked (flock) while its builder lives, so that what a killed
builder left behind is recognised, also across containers that share a disk but not their process ids.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.artifact.rename import exchange, rename_new
from exporter.core.disk import FULL, full
from exporter.core.errors import InputError

MANIFEST = "manifest.json"


@contextmanager
def staged_directory(final: Path, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A private directory that becomes `final` when the block ends, and vanishes when it raises.

    An artifact already at `final` is replaced, at the very end, only with `force`. `source`, the
    checkpoint, is guarded against being overwritten. Raises InputError (`output.*`), also when the disk is full.
    """
    final = _absolute(final)
    check_output(final, force, source)
    with _parents(final):
        remove_stale(final)
        check_output(final, force, source)  # again: an artifact may have been restored
        staging, lock = _create(final)
        try:
            yield staging
            _sync(staging)
            _publish(staging, final, force)
        except OSError as error:
            if error.errno in FULL:
                raise full(final, error) from error
            raise
        finally:
            # After success this path holds the replaced artifact, or nothing.
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)


@contextmanager
def _parents(final: Path) -> Iterator[None]:
    """The missing directories above `final`; those made here go again, where empty, if the block raises."""
    missing = [folder for folder in final.parents if not folder.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            "output.unwritable", f"cannot create {final.parent}: {error.strerror}", "choose another --out"
        ) from error
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_output(final: Path, force: bool, source: Path | None = None) -> None:
    """Refuse an output path that cannot or must not be written, before any work is done."""
    final = _absolute(final)
    if final.is_symlink():
        raise InputError("output.symlink", f"{final} is a symbolic link", "give the directory it points to")
    if source is not None:
        _guard_source(final, source)
    _check_parent(final)
    if not os.path.lexists(final):
        return
    if not final.is_dir():
        raise InputError("output.not_directory", f"{final} exists and is not a directory", "choose another --out")
    if not force:
        raise InputError("output.exists", f"{final} exists already", "give --force to replace it, or another --out")
    if any(final.iterdir()) and not (final / MANIFEST).is_file():
        raise InputError(
            "output.not_artifact",
            f"{final} is not empty and holds no {MANIFEST}: it is not an engine that --force may replace",
            "choose another --out, or remove the directory yourself",
        )


def _check_parent(final: Path) -> None:
    parent = next(folder for folder in final.parents or [final] if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError("output.parent", f"{parent} is not a directory", "choose another --out")
    if final.parent == final:
        raise InputError("output.root", f"{final} cannot be an output directory", "choose another --out")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("output.unwritable", f"{parent} is not writable", "choose a directory you may write to")


def _absolute(final: Path) -> Path:
    """The path with its parent resolved and its own name kept, which may be a link that must be refused."""
    return final.parent.resolve() / final.name if final.name not in ("", "..") else final.resolve()


def _guard_source(final: Path, source: Path) -> None:
    checkpoint, target = source.resolve(), final.resolve()
    if target == checkpoint or target in checkpoint.parents or checkpoint in target.parents:
        raise InputError(
            "output.checkpoint",
            f"writing {final} would replace the checkpoint {checkpoint}, or add to it",
            "choose an --out outside the checkpoint",
        )


def _create(final: Path) -> tuple[Path, int]:
    """A new, empty, locked directory beside `final`, and the descriptor that holds its lock."""
    while True:
        staging = final.parent / f".{final.name}.building-{os.getpid()}-{secrets.token_hex(6)}"
        try:
            staging.mkdir(mode=0o777)
        except OSError as error:
            if error.errno in FULL:
                raise full(final, error) from error
            raise InputError(
                "output.unwritable", f"cannot write beside {final}: {error.strerror}", "choose another --out"
            ) from error
        with suppress(FileNotFoundError):
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
            # Another build's clean-up may have taken the directory before it was locked.
            if _lock(descriptor) is not False and staging.exists():
                return staging, descriptor
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock: True, False if its builder lives, None where the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_stale(final: Path) -> None:
    """Remove what killed builds of `final` left beside it; restore an artifact one was about to replace."""
    for path in _siblings(final, "replaced"):
        if not _is_dead(_pid(path)):
            continue
        if os.path.lexists(final):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in _siblings(final, "building"):
        _remove_abandoned(path)


def _siblings(final: Path, state: str) -> list[Path]:
    prefix = f".{final.name}.{state}-"
    return [path for path in final.parent.iterdir() if path.name.startswith(prefix) and path.is_dir()]


def _remove_abandoned(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        taken = _lock(descriptor)
        if taken or (taken is None and _is_dead(_pid(path))):
            # The lock is held meanwhile: a builder that has just made this directory must notice.
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _pid(path: Path) -> str:
    return path.name.rsplit("-", 2)[-2]


def _is_dead(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _sync(directory: Path) -> None:
    """Bring every file and directory to the disk, so that the rename cannot outlive its contents."""
    for root, _, files in os.walk(directory):
        for path in [*(Path(root, name) for name in files), Path(root)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _publish(staging: Path, final: Path, force: bool) -> None:
    try:
        rename_new(staging, final)
    except FileExistsError:
        if not force:
            raise InputError("output.exists", f"{final} appeared during the build", "give --force") from None
        exchange(staging, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
