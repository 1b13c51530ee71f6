"""Linking an engine's objects into a shared library, for this machine or another one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from exporter.core.errors import UnsupportedError
from exporter.core.machine import triple
from targets.tvm.devices import Device
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
        if done.returncode:
            raise UnsupportedError(
                "tvm.link",
                f"{' '.join(command)} failed to link the engine: {(done.stderr or done.stdout).strip()[-500:]}",
                "check the C compiler, or install ziglang (pip install 'enginesmith[tvm]')",
            )

    return link


def link_command(device: Device) -> list[str]:
    """The compiler driver: the system's own for this machine, ziglang for others or where there is none."""
    if device.triple == triple():
        for name in COMPILERS:
            if found := shutil.which(name):
                return [found]
    if find_spec("ziglang") is None:
        raise UnsupportedError(
            "tvm.linker",
            f"no linker for {device.triple}: neither a C compiler nor ziglang is installed",
            "pip install 'enginesmith[tvm]'",
        )
    return [sys.executable, "-m", "ziglang", "cc", "-target", f"{device.machine}-linux-gnu.{GLIBC}"]


def can_link() -> bool:
    """Whether libraries can be linked here at all."""
    return find_spec("ziglang") is not None or any(map(shutil.which, COMPILERS))
