"""From the lowered model to object code: the short way through TVM, and the file that links it."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.core.disk import full
from targets.tvm.devices import Device
from targets.tvm.link import linker
from targets.tvm.tuning import DEFAULT, Tuning

if TYPE_CHECKING:
    import tvm

    from targets.tvm.lower.program import LoweredModel

OBJECT_BYTES = 16 << 20
"""What objects and library take in the folder for temporary files, several times over."""


def compile_engine(model: "LoweredModel", device: Device, library: Path, tuning: Tuning = DEFAULT) -> None:
    """Write the engine's library for a device; the same model and tuning give the same bytes.

    A step takes `tuning.chunk` tokens at most.
    """
    from targets.tvm.lower.relax_module import relax_module

    compile_module(relax_module(model, device.isa, tuning), device, library)


def compile_module(module: "tvm.IRModule", device: Device, library: Path) -> None:
    """Compile and link a Relax module whose kernels are written: nothing is fused, scheduled or legalised."""
    import tvm

    from targets.tvm.kernels.pipeline import compiling

    _require_room()
    with compiling():
        executable = tvm.compile(module, tvm.target.Target(device.tvm_target()), relax_pipeline=_pipeline())
    executable.export_library(str(library), fcompile=linker(device))


def _require_room() -> None:
    """LLVM ends the process when it cannot write the objects, so there is no error to catch then."""
    folder = Path(tempfile.gettempdir())
    if shutil.disk_usage(folder).free < OBJECT_BYTES:
        raise full(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _pipeline() -> "tvm.transform.Pass":
    """Relax to bytecode: buffers are planned once for the longest step, then every call is a plain call."""
    import tvm
    from tvm.relax import transform

    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
