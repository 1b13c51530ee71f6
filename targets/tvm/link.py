"""Linking an engine's objects into a shared library, for this machine or another one."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from exporter.core.disk import full
from exporter.core.errors import UnsupportedError
from exporter.core.machine import triple
from targets.tvm.devices import HOST, Device
from targets.tvm.native import THREAD_POOL

GLIBC = "2.28"
"""The oldest C library that engines linked for other machines run on."""
# No build identifier and no symbols of local things: the same objects give the same bytes.
FLAGS = ("-shared", "-fPIC", "-O2", "-Wl,--build-id=none", "-Wl,-s", "-lm", "-lpthread")
COMPILERS = ("cc", "gcc", "clang")

Link = Callable[..., None]


def linker(device: Device) -> Link:
    """What TVM calls as link(output, objects, options) for a device."""
    command = link_command(device)

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        done = subprocess.run(
            [*command, "-o", output, *objects, str(THREAD_POOL), *FLAGS, *(options or ())],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "SOURCE_DATE_EPOCH": "0"},
        )
        said = (done.stderr or done.stdout).strip()
        if done.returncode and os.strerror(errno.ENOSPC) in said:
            raise full(Path(output), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        if done.returncode:
            raise UnsupportedError(
                "tvm.link",
                f"{' '.join(command)} failed to link the engine: {said[-500:]}",
                "check the C compiler, or install ziglang (pip install 'enginesmith[tvm]')",
            )

    return link


def link_command(device: Device) -> list[str]:
    """The compiler driver: this machine's own for an engine that stays here; ziglang for named devices, whose C
    library may be older, and where there is no compiler."""
    here = device.triple == triple()
    own = next((found for name in COMPILERS if (found := shutil.which(name))), None) if here else None
    zig = find_spec("ziglang") is not None
    if own is not None and (device.name == HOST or not zig):
        return [own]
    if not zig:
        raise UnsupportedError(
            "tvm.linker",
            f"no linker for {device.triple}: neither a C compiler for it nor ziglang is installed",
            "pip install 'enginesmith[tvm]'",
        )
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{device.machine}-linux-gnu.{GLIBC}"]


def can_link() -> bool:
    """Whether libraries can be linked here at all."""
    return find_spec("ziglang") is not None or any(map(shutil.which, COMPILERS))
