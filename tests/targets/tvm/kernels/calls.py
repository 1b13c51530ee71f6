"""What a compiled kernel calls besides TVM's runtime, read from its assembly; for every profile, also those of
other machines."""

import re
from typing import Any

import pytest

from targets.tvm.isa import PROFILES, Isa

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
from targets.tvm.kernels.pipeline import compiling  # noqa: E402

all_profiles = pytest.mark.parametrize("isa", PROFILES.values(), ids=lambda isa: isa.name)
OWN = re.compile(r"TVM|__tvm_|memset|memcpy|\*|x\d+$")


def assembly(function: Any, isa: Isa) -> str:
    """A kernel compiled for a profile, on whatever machine."""
    triple = f"{isa.machine}-linux-gnu"
    described = {"kind": "llvm", "mtriple": triple, "mcpu": isa.mcpu, "mattr": list(isa.mattr)}
    with compiling():
        return str(tvm.compile(function, target=tvm.target.Target(described)).mod.inspect_source("asm"))


def outside_calls(function: Any, isa: Isa) -> set[str]:
    """Names of functions that neither the kernel nor TVM's runtime defines; memset and memcpy are always there."""
    name, text = str(function.attrs["global_symbol"]), assembly(function, isa)
    called = set(re.findall(r"^\s+(?:callq?|bl|blr)\s+(\S+)", text, re.MULTILINE))
    return {call for call in called if not OWN.match(call) and not call.startswith((name, f".L{name}"))}
