"""Kernels compiled for every profile that this machine runs, and called on NumPy arrays."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TVM_NUM_THREADS", "2")
tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

from exporter.artifact.host import cpu_features  # noqa: E402
from targets.tvm.isa import PROFILES, Isa  # noqa: E402
from targets.tvm.kernels.pipeline import compiling  # noqa: E402

# The same intrinsics in EVEX form, for CPUs that have AVX-512 VNNI and no AVX-VNNI.
EVEX_VNNI = ("avx512vl", "avx512_vnni")


def attributes(isa: Isa) -> tuple[str, ...] | None:
    """LLVM attributes that run this profile here; None when nothing does."""
    here = set(cpu_features())
    if isa.machine != os.uname().machine:
        return None
    if here.issuperset(isa.cpu_features):
        return isa.mattr
    if here.issuperset((*(f for f in isa.cpu_features if f != "avx_vnni"), *EVEX_VNNI)):
        return ("+avx512vl", "+avx512vnni")
    return None


NATIVE = [isa for isa in PROFILES.values() if attributes(isa) is not None]
every_profile = pytest.mark.parametrize("isa", NATIVE, ids=lambda isa: isa.name)


def compiled(function: Any, isa: Isa) -> Callable[..., None]:
    """The kernel as a function of NumPy arrays; outputs are written in place."""
    target = tvm.target.Target({"kind": "llvm", "mcpu": isa.mcpu, "mattr": list(attributes(isa) or ())})
    with compiling():
        run = tvm.compile(function, target=target)[function.attrs["global_symbol"]]
    return lambda *arrays: run(*(tvm.runtime.from_dlpack(array) for array in arrays))


def aligned(array: Any) -> np.ndarray:
    """A copy on a 64-byte boundary."""
    array = np.ascontiguousarray(array)
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
