"""What a family of CPUs can do with vectors, as kernels ask for it. docs/tvm-kernels.md lists the profiles."""

from collections.abc import Callable
from dataclasses import dataclass

from exporter.core.errors import UnsupportedError


@dataclass(frozen=True)
class Isa:
    """A vector instruction set. Kernels are generated from it; it holds no TVM object.

    `lanes`: 32-bit lanes of a vector. `registers`: vector registers. `dot`: which instructions multiply bytes:
    `vnni` (unsigned x signed, 4 products a lane), `maddubs` (unsigned x signed, pairs, 16 bit), `sdot` (signed x
    signed, 4 products a lane), `smmla` (2 x 8 by 8 x 2), `smull` (widening products).
    `fma`, `half`: fused multiply-add, conversion of float16 in hardware. `cpu_features`: names of /proc/cpuinfo
    that an engine of this profile needs.
    """

    name: str
    machine: str
    lanes: int
    registers: int
    dot: str
    fma: bool
    half: bool
    cpu_features: tuple[str, ...]
    mcpu: str
    mattr: tuple[str, ...] = ()

    @property
    def int8_offset(self) -> int:
        """What is added to an int8 code before it is stored: VNNI multiplies unsigned by signed bytes."""
        return 128 if self.dot == "vnni" else 0


_V2 = ("sse4_1", "sse4_2", "ssse3", "popcnt", "cx16", "lahf_lm")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

PROFILES: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa(
            "x86-64-v4-vnni", "x86_64", 16, 32, "vnni", True, True, (*_V4, "avx512_vnni"), "x86-64-v4", ("+avx512vnni",)
        ),
        Isa("x86-64-v3-vnni", "x86_64", 8, 16, "vnni", True, True, (*_V3, "avx_vnni"), "x86-64-v3", ("+avxvnni",)),
        Isa("x86-64-v3", "x86_64", 8, 16, "maddubs", True, True, _V3, "x86-64-v3"),
        Isa("x86-64-v2", "x86_64", 4, 16, "maddubs", False, False, _V2, "x86-64-v2"),
        Isa(
            "aarch64-i8mm",
            "aarch64",
            4,
            32,
            "smmla",
            True,
            True,
            ("asimd", "asimddp", "i8mm"),
            "generic",
            ("+neon", "+dotprod", "+i8mm"),
        ),
        Isa(
            "aarch64-dotprod",
            "aarch64",
            4,
            32,
            "sdot",
            True,
            True,
            ("asimd", "asimddp"),
            "generic",
            ("+neon", "+dotprod"),
        ),
        Isa("aarch64-neon", "aarch64", 4, 32, "smull", True, True, ("asimd",), "generic", ("+neon",)),
    )
}


def profile(name: str) -> Isa:
    """The profile of a name; UnsupportedError lists those that exist."""
    if name not in PROFILES:
        raise UnsupportedError("tvm.profile", f"CPU profile {name!r} is unknown", f"available: {', '.join(PROFILES)}")
    return PROFILES[name]


def best_profile(machine: str, has: Callable[[str], bool]) -> Isa | None:
    """The fastest profile that a CPU with these /proc/cpuinfo features runs; None when there is none."""
    fitting = (isa for isa in PROFILES.values() if isa.machine == machine and all(map(has, isa.cpu_features)))
    return next(fitting, None)
