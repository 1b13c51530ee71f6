"""An engine's library in this process, through apache-tvm-ffi and libtvm_runtime alone: `tvm` is not imported."""

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from exporter.core.errors import ArtifactError, UnsupportedError

RUNTIME_VARIABLE = "ENGINESMITH_TVM_RUNTIME"
RUNTIME = "libtvm_runtime.so"
INSTALL = "pip install 'enginesmith[tvm]'"
CPU, POOLED = 1, 2  # DLDeviceType kDLCPU; the VM's allocator that keeps freed memory for the next step

Function = Callable[..., Any]


class EngineLibrary:
    """A loaded engine.so with its virtual machine started. Raises UnsupportedError `tvm.missing` without the runtime,
    ArtifactError `tvm.load` when the library does not load."""

    def __init__(self, path: Path) -> None:
        ffi = import_ffi()
        load_runtime()
        try:
            # Not kept alive: the same path may hold another engine later in this process.
            module = ffi.load_module(str(path), keep_module_alive=False)
            self._vm = module["vm_load_executable"]()
            self._vm["vm_initialization"](CPU, 0, POOLED)
            self._threads: Function = module.get_function("threads", query_imports=True)
        except (AttributeError, OSError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactError(
                "tvm.load",
                f"TVM's runtime cannot load {path.name}: {lines[-1]}",
                "build the engine again with the installed versions of enginesmith and apache-tvm",
            ) from error

    def function(self, name: str) -> Function:
        """A function of the virtual machine. Raises ArtifactError when there is none of that name."""
        try:
            found: Function = self._vm[name]
        except AttributeError as error:
            raise ArtifactError("tvm.load", f"the engine has no function {name!r}", "build it again") from error
        return found

    def use_threads(self, count: int) -> None:
        """Run the following steps on `count` threads, the caller's included; takes below a microsecond."""
        self._threads(count)


def import_ffi() -> ModuleType:
    """The module tvm_ffi, without the torch that it would import if it were installed."""
    loaded = sys.modules.get("tvm_ffi")
    if loaded is not None:
        return loaded
    with _without_torch():
        try:
            import tvm_ffi
        except ImportError as error:
            raise UnsupportedError("tvm.missing", f"apache-tvm-ffi cannot be imported: {error}", INSTALL) from error
    module: ModuleType = tvm_ffi
    return module


def load_runtime() -> None:
    """libtvm_runtime.so, its symbols visible to engine libraries. Raises UnsupportedError `tvm.missing`."""
    path = runtime_path()
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UnsupportedError("tvm.missing", f"TVM's runtime cannot be loaded: {error}", INSTALL) from error


def runtime_path() -> Path:
    """Where libtvm_runtime.so is: ENGINESMITH_TVM_RUNTIME (the file or its folder), else in the package apache-tvm."""
    given = os.environ.get(RUNTIME_VARIABLE)
    if given:
        path = Path(given) / RUNTIME if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise UnsupportedError(
                "tvm.missing", f"{RUNTIME_VARIABLE} names {given}, no such file", f"name the path of {RUNTIME}"
            )
        return path
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / RUNTIME
        if path.is_file():
            return path
    raise UnsupportedError("tvm.missing", f"apache-tvm is not installed: no {RUNTIME}", INSTALL)


class _NoTorch:
    """A finder that knows nothing of torch, asked by one thread only."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is not needed", name=name)
        return None


@contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch where it is installed (most of a second) and may compile an extension for it."""
    finder, variable = _NoTorch(), "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
