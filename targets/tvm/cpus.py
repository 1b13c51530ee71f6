"""CPUs by LLVM's name, and what LLVM may emit for each of their features, in the words of /proc/cpuinfo."""

from collections.abc import Iterable
from dataclasses import dataclass

# LLVM's feature -> the names in /proc/cpuinfo that prove it. Only what the compiler may use unasked: not cryptography,
# random numbers, system instructions or matrix tiles, which it emits for intrinsics alone.
CPUINFO: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "sse3": ("pni",),
        "ssse3": ("ssse3",),
        "sse4.1": ("sse4_1",),
        "sse4.2": ("sse4_2",),
        "sse4a": ("sse4a",),
        "popcnt": ("popcnt",),
        "cx16": ("cx16",),
        "sahf": ("lahf_lm",),
        "avx": ("avx",),
        "avx2": ("avx2",),
        "bmi": ("bmi1",),
        "bmi2": ("bmi2",),
        "f16c": ("f16c",),
        "fma": ("fma",),
        "lzcnt": ("abm",),
        "movbe": ("movbe",),
        "gfni": ("gfni",),
        "avxvnni": ("avx_vnni",),
        "avx512f": ("avx512f",),
        "avx512bw": ("avx512bw",),
        "avx512cd": ("avx512cd",),
        "avx512dq": ("avx512dq",),
        "avx512vl": ("avx512vl",),
        "avx512vnni": ("avx512_vnni",),
        "avx512bf16": ("avx512_bf16",),
        "avx512fp16": ("avx512_fp16",),
        "avx512bitalg": ("avx512_bitalg",),
        "avx512ifma": ("avx512ifma",),
        "avx512vbmi": ("avx512vbmi",),
        "avx512vbmi2": ("avx512_vbmi2",),
        "avx512vpopcntdq": ("avx512_vpopcntdq",),
        "avx512vp2intersect": ("avx512_vp2intersect",),
    },
    "aarch64": {
        "neon": ("asimd",),
        "lse": ("atomics",),
        "lse2": ("uscat",),
        "rdm": ("asimdrdm",),
        "fullfp16": ("fphp", "asimdhp"),
        "fp16fml": ("asimdfhm",),
        "rcpc": ("lrcpc",),
        "rcpc-immo": ("ilrcpc",),
        "dotprod": ("asimddp",),
        "complxnum": ("fcma",),
        "jsconv": ("jscvt",),
        "flagm": ("flagm",),
        "altnzcv": ("flagm2",),
        "fptoint": ("frint",),
        "sha3": ("sha3",),
        "i8mm": ("i8mm",),
        "bf16": ("bf16",),
        "sve": ("sve",),
        "sve2": ("sve2",),
        "sve-bitperm": ("svebitperm",),
    },
}


@dataclass(frozen=True)
class Cpu:
    """A CPU of LLVM: its machine and the features of CPUINFO that LLVM takes it to have."""

    machine: str
    features: frozenset[str]


def _cpus(machine: str, features: dict[str, str]) -> dict[str, Cpu]:
    """`features`: words, of which a CPU's name stands for all it has."""
    known: dict[str, Cpu] = {}
    for name, words in features.items():
        found: set[str] = set()
        for word in words.split():
            found |= known[word].features if word in known else {word}
        known[name] = Cpu(machine, frozenset(found))
    return known


CPUS: dict[str, Cpu] = {
    **_cpus(
        "x86_64",
        {
            "x86-64-v2": "sse3 ssse3 sse4.1 sse4.2 popcnt cx16 sahf",
            "x86-64-v3": "x86-64-v2 avx avx2 bmi bmi2 f16c fma lzcnt movbe",
            "x86-64-v4": "x86-64-v3 avx512f avx512bw avx512cd avx512dq avx512vl",
            "haswell": "x86-64-v3",
            "skylake": "x86-64-v3",
            "skylake-avx512": "x86-64-v4",
            "cascadelake": "x86-64-v4 avx512vnni",
            "icelake-server": "cascadelake avx512bitalg avx512ifma avx512vbmi avx512vbmi2 avx512vpopcntdq gfni",
            "sapphirerapids": "icelake-server avx512bf16 avx512fp16 avxvnni",
            "alderlake": "x86-64-v3 avxvnni gfni",
            "znver2": "x86-64-v3 sse4a",
            "znver3": "znver2",
            "znver4": "icelake-server avx512bf16 sse4a",
            "znver5": "znver4 avx512vp2intersect avxvnni",
        },
    ),
    **_cpus(
        "aarch64",
        {
            "generic": "neon",
            "cortex-a53": "neon",
            "cortex-a72": "neon",
            "cortex-a55": "neon lse rdm fullfp16 rcpc dotprod",
            "cortex-a76": "cortex-a55",
            "cortex-a78": "cortex-a55",
            "cortex-a78ae": "cortex-a55",
            "neoverse-n1": "cortex-a55",
            "neoverse-v1": "neoverse-n1 lse2 rcpc-immo complxnum jsconv flagm fp16fml sha3 i8mm bf16 sve",
            "neoverse-n2": "neoverse-n1 lse2 rcpc-immo complxnum jsconv flagm altnzcv fptoint fp16fml i8mm bf16 "
            "sve sve2 sve-bitperm",
            "neoverse-v2": "neoverse-n2",
            "ampere1": "neoverse-n1 lse2 rcpc-immo complxnum jsconv flagm altnzcv fptoint sha3 i8mm bf16",
        },
    ),
}


def cpuinfo_names(machine: str, features: Iterable[str]) -> frozenset[str]:
    """What /proc/cpuinfo must name for LLVM's `features`, all of which CPUINFO knows."""
    table = CPUINFO[machine]
    return frozenset(name for feature in features for name in table[feature])
