"""Failed writes in words: a full disk, and everything else."""

import errno
from pathlib import Path

import pytest

from exporter.core.disk import output_errors
from exporter.core.errors import InputError


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, "output.full"),
        (errno.EDQUOT, "output.full"),
        (errno.EFBIG, "output.full"),
        (errno.EACCES, "output.write"),
        (errno.EIO, "output.write"),
    ],
)
def test_a_full_disk_is_told_apart(number: int, kind: str) -> None:
    with pytest.raises(InputError) as caught, output_errors(Path("weights.bin")):
        raise OSError(number, "the system's words")
    assert caught.value.kind == kind and caught.value.remedy
    assert "weights.bin" in caught.value.message and "the system's words" in caught.value.message


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), output_errors(Path("weights.bin")):
        raise ValueError("mine")
