"""What this machine is: triple, CPU features, physical cores."""

import math
import os
import platform
import sys
from functools import cache
from pathlib import Path

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


def machine() -> str:
    """The processor's architecture: `x86_64`, `aarch64`."""
    name = platform.machine().lower()
    return MACHINES.get(name, name)


def triple() -> str:
    """Machine and system as manifests name them: `x86_64-linux`, `aarch64-linux`."""
    return f"{machine()}-{sys.platform}"


@cache
def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction set extensions, named as /proc/cpuinfo names them; empty where it does not exist."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name; on aarch64, which has none, the numbers of its maker and part; else its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if values.get("model name"):
        return values["model name"]
    numbers = [values.get("CPU implementer", ""), values.get("CPU part", "")]
    return " ".join(["CPU", *numbers]) if all(numbers) else machine()


def physical_cores() -> int:
    """Cores this process may use: affinity, without hyperthreads, within the control group's CPU quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_core_of(cpu, TOPOLOGY) for cpu in cpus})
    quota = cpu_quota(CGROUP, _own_cgroup())
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def _core_of(cpu: int, topology: Path) -> str:
    """A name that CPUs of one physical core share; its own number where the topology is unknown."""
    folder = topology / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        try:
            return (folder / name).read_text().strip()
        except OSError:
            continue
    return str(cpu)


def _own_cgroup() -> str:
    """This process's path in the unified hierarchy, `/` inside most containers."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def cpu_quota(root: Path, group: str) -> float | None:
    """CPUs granted by the tightest limit from a control group up to `root`; None without limit.

    cgroup v2: `cpu.max` holds "quota period" in microseconds, or "max". v1: `cpu.cfs_*_us` at the root.
    """
    quotas = []
    folder = root / group.strip("/")
    for level in [folder, *folder.parents]:
        if not level.is_relative_to(root):
            break
        quotas.append(_quota(level / "cpu.max"))
    quotas.append(_quota(root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(*files: Path) -> float | None:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()[:2]
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):
        return None
