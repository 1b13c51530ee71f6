"""An output directory that appears complete or not at all.

Everything is written to a private directory beside the final one, `.<name>.building-<pid>-<random>`,
and renamed at the end. What killed builders left behind is removed (exporter/core/temporary_directory.py).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.artifact.rename import exchange, rename_new
from exporter.core.disk import FULL, full
from exporter.core.errors import InputError
from exporter.core.temporary_directory import (
    CALIBRATION,
    TemporaryDirectory,
    beside,
    create,
    process_is_dead,
    remove_abandoned,
    siblings,
)

MANIFEST = "manifest.json"
BUILDING = "building"


@contextmanager
def staged_directory(final: Path, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A private directory that becomes `final` when the block ends, and vanishes when it raises.

    An artifact already at `final` is replaced, at the very end, only with `force`. `source`, the
    checkpoint, is guarded against being overwritten. Raises InputError (`output.*`), also when the disk is full.
    """
    final = beside(final)
    check_output(final, force, source)
    with _parents(final):
        remove_stale(final)
        check_output(final, force, source)  # again: an artifact may have been restored
        directory = _create(final)
        staging = directory.path
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
            directory.remove()


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
    final = beside(final)
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


def _guard_source(final: Path, source: Path) -> None:
    checkpoint, target = source.resolve(), final.resolve()
    if target == checkpoint or target in checkpoint.parents or checkpoint in target.parents:
        raise InputError(
            "output.checkpoint",
            f"writing {final} would replace the checkpoint {checkpoint}, or add to it",
            "choose an --out outside the checkpoint",
        )


def _create(final: Path) -> TemporaryDirectory:
    try:
        return create(final, BUILDING, mode=0o777)
    except OSError as error:
        if error.errno in FULL:
            raise full(final, error) from error
        raise InputError(
            "output.unwritable", f"cannot write beside {final}: {error.strerror}", "choose another --out"
        ) from error


def remove_stale(final: Path) -> None:
    """Remove what killed builds of `final` left beside it; restore an artifact one was about to replace."""
    for path in siblings(final, "replaced"):
        if not process_is_dead(path):
            continue
        if os.path.lexists(final):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    remove_abandoned(final, BUILDING, CALIBRATION)


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
