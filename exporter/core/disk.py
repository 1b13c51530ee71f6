"""Errors of writing files, in words; a full disk is told apart from everything else."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.core.errors import InputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns OSError while writing `path` into an InputError that says what to do: `output.full`, `output.write`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(path, error) from error
        raise InputError(
            "output.write",
            f"cannot write {path.name}: {error.strerror or error}",
            "choose another output directory",
        ) from error


def full(path: Path, error: OSError) -> InputError:
    """The refusal of a disk, or a quota, that ran full."""
    return InputError(
        "output.full",
        f"no space left for {path}: {error.strerror or error}",
        "free some disk space (`enginesmith plan` tells how much a build needs) or choose another --out; "
        "temporary files go to $TMPDIR",
    )
