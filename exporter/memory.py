"""The memory a process holds and may hold: the figures of `plan`, `build --max-ram` and the benchmarks."""

import os
import resource
from pathlib import Path

from exporter.core.errors import BudgetError
from exporter.core.memory import release_free_memory

__all__ = ["available_bytes", "check_peak", "peak_resident_bytes", "release_free_memory"]


def peak_resident_bytes() -> int:
    """The most this process ever held resident, file pages included (the kernel's VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel reports no VmHWM")


def peak_bytes() -> int:
    """The same, or the most that a process started by this one held, whichever is larger."""
    return max(peak_resident_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_peak(limit: int | None, stage: str) -> None:
    """Raise BudgetError if the process, or one it started, has ever held more than `limit` bytes."""
    peak = peak_bytes()
    if limit is not None and peak > limit:
        raise BudgetError(
            "memory.exceeded",
            f"after stage {stage} the build had held {peak / 1e9:.2f} GB, --max-ram allows {limit / 1e9:.2f} GB",
            "allow more memory, build with --no-parity, or see `enginesmith plan`",
        )
