"""aarch64 programs on any machine: natively where it is one, else under qemu-user; absent, the tests skip and say so.

`.ci/emulation` installs what is needed on Debian. To run a kernel: `aarch64().kernel(function, isa)(*arrays)`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.core.machine import machine
from targets.tvm.isa import Isa

ROOT = Path(__file__).resolve().parents[2]
SYSROOT = Path("/usr/aarch64-linux-gnu")
LIBRARIES = Path(os.environ.get("ENGINESMITH_AARCH64_LIBRARIES", ROOT / "build" / "aarch64"))
NAMES = ("libtvm_runtime.so", "libtvm_ffi.so")
QEMU = "qemu-aarch64-static"
# A core of qemu's that has exactly what a profile needs.
CORES = {"aarch64-neon": "cortex-a72", "aarch64-dotprod": "cortex-a76", "aarch64-i8mm": "max"}
DTYPE_CODES = {"i": 0, "u": 1, "f": 2}


@dataclass(frozen=True)
class Aarch64:
    """Where programs run and what they are linked with."""

    libraries: Path

    def run(self, *words: str | Path, core: str = "max", check: bool = True) -> subprocess.CompletedProcess[str]:
        """A program with its arguments, on one of qemu's cores."""
        path = f"{self.libraries}:{SYSROOT / 'lib'}"
        # TVM's threads spin while they wait; a thread that spins under emulation starves beside other processes.
        environment = f"LD_LIBRARY_PATH={path},TVM_NUM_THREADS=1"
        command = [QEMU, "-cpu", core, "-L", str(SYSROOT), "-E", environment]
        done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False, timeout=300)
        assert not check or done.returncode == 0, f"{words[0]} failed: {done.returncode}\n{done.stderr}"
        return done

    def kernel(self, function: Any, isa: Isa, folder: Path) -> Callable[..., None]:
        """A kernel compiled for a profile, as a function of NumPy arrays; those it writes are changed in place."""
        import tvm

        from targets.tvm.devices import DEVICES
        from targets.tvm.link import linker

        name = str(function.attrs["global_symbol"])
        device = next(found for found in DEVICES.values() if found.isa == isa)
        number = len(list(folder.glob("*.so")))
        library, data = folder / f"{number}.so", folder / f"{number}.bin"
        compiled = tvm.compile(function, target=tvm.target.Target(device.tvm_target()))
        compiled.export_library(str(library), fcompile=linker(device))
        runner = self.program("cc", ROOT / "tests" / "support" / "kernel_runner.c")

        def call(*arrays: np.ndarray) -> None:
            write_tensors(data, arrays)
            self.run(runner, library, name, data, core=CORES[isa.name])
            read_tensors(data, arrays)

        return call

    def program(self, driver: str, *sources: Path) -> Path:
        """A C (`cc`) or C++ (`c++`) program beside the libraries, compiled again when a source is newer."""
        program = self.libraries / sources[0].stem
        newest = max(source.stat().st_mtime for source in sources)
        if not program.exists() or program.stat().st_mtime < newest:
            unfinished = program.with_name(f"{program.name}.{os.getpid()}")
            compile_aarch64(driver, sources[0], unfinished, self.libraries)
            unfinished.replace(program)
        return program


def aarch64() -> Aarch64:
    """Skips the test, with every reason, where aarch64 programs cannot run."""
    if missing := _missing():
        pytest.skip(f"aarch64 not tested: no {', '.join(missing)}; .ci/emulation installs them")
    return Aarch64(LIBRARIES)


@cache
def _missing() -> tuple[str, ...]:
    from importlib.util import find_spec

    needed = {
        QEMU: shutil.which(QEMU) is not None,
        f"arm64 libstdc++ in {SYSROOT}": (SYSROOT / "lib" / "libstdc++.so.6").exists(),
        "ziglang": find_spec("ziglang") is not None,
        "apache-tvm": find_spec("tvm") is not None,
        f"{' or '.join(NAMES)} for aarch64": all((LIBRARIES / name).exists() for name in NAMES),
        "x86-64 host": machine() == "x86_64",
    }
    return tuple(what for what, there in needed.items() if not there)


def compile_aarch64(driver: str, source: Path, program: Path, libraries: Path) -> None:
    """`driver` is `cc` or `c++`; against tvm_ffi's headers. The first C++ program takes a minute: ziglang compiles
    its library then and keeps it."""
    from tvm_ffi import libinfo

    command = [sys.executable, "-m", "ziglang", driver, "-target", "aarch64-linux-gnu.2.28", "-O2"]
    if driver == "c++":
        command.append("-std=c++17")
    include = [f"-isystem{libinfo.find_include_path()}", f"-isystem{libinfo.find_dlpack_include_path()}"]
    link = ["-o", str(program), f"-L{libraries}", "-ltvm_ffi", "-ldl"]
    done = subprocess.run([*command, *include, str(source), *link], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write_tensors(file: Path, arrays: tuple[np.ndarray, ...]) -> None:
    """The format of kernel_runner.c."""
    with file.open("wb") as out:
        out.write(np.int64(len(arrays)).tobytes())
        for array in arrays:
            code, bits = DTYPE_CODES[array.dtype.kind], array.dtype.itemsize * 8
            out.write(np.array([code, bits, array.ndim, *array.shape], np.int64).tobytes())
            out.write(np.ascontiguousarray(array).tobytes())


def read_tensors(file: Path, arrays: tuple[np.ndarray, ...]) -> None:
    """Back into the same arrays."""
    data, place = file.read_bytes(), 8
    for array in arrays:
        place += 8 * (3 + array.ndim)
        array[...] = np.frombuffer(data, array.dtype, array.size, place).reshape(array.shape)
        place += array.nbytes
    assert place == len(data)
