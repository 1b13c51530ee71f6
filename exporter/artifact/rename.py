"""Two renames that Python lacks: onto a free name only, and an atomic exchange (Linux renameat2).

Where the kernel or the file system has no renameat2, plain renames do the same with a short gap.
"""

import ctypes
import errno
import os
import secrets
from pathlib import Path

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory; FileExistsError if anything has the new name already."""
    if _renameat2(source, target, RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(first: Path, second: Path) -> None:
    """Swap two directories; a failure leaves both where they were."""
    if not _renameat2(first, second, RENAME_EXCHANGE):
        exchange_in_steps(first, second)


def exchange_in_steps(first: Path, second: Path) -> None:
    """The swap by plain renames, each undone when the next one fails; `remove_stale` mends a kill in the gap."""
    aside = second.with_name(f".{second.name}.replaced-{os.getpid()}-{secrets.token_hex(6)}")
    second.rename(aside)
    try:
        first.rename(second)
    except BaseException:
        aside.rename(second)
        raise
    aside.rename(first)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Whether the call exists and succeeded; OSError when it exists and failed."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = [os.fsencode(path) for path in (source, target)]
    if call(AT_FDCWD, paths[0], AT_FDCWD, paths[1], ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
