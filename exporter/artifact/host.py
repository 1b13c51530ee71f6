"""What this machine is: triple, CPU features, physical cores; and whether an artifact fits it."""

import math
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from exporter.artifact.manifest import Manifest

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Mismatch:
    """One reason why an artifact does not run here: `what` is `triple`, `cpu_features` or `requirements`."""

    what: str
    message: str
    remedy: str


def triple() -> str:
    """Machine and system as manifests name them: `x86_64-linux`, `aarch64-linux`."""
    machine = platform.machine().lower()
    return f"{MACHINES.get(machine, machine)}-{sys.platform}"


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


def check_host(manifest: Manifest) -> list[Mismatch]:
    """Every reason why this machine cannot run an engine; empty when it can."""
    found = []
    if manifest.triple != triple():
        found.append(
            Mismatch(
                "triple",
                f"the engine was built for {manifest.triple}, this is {triple()}",
                "build it again from the checkpoint on a machine like this one",
            )
        )
        return found
    requirements = dict(manifest.requirements)
    wanted = requirements.pop("cpu_features", [])
    if missing := sorted(set(wanted) - cpu_features()):
        found.append(
            Mismatch(
                "cpu_features",
                f"the engine needs CPU features that this machine lacks: {', '.join(missing)}",
                "run it on a newer CPU, or build it again on this machine",
            )
        )
    if requirements:
        found.append(
            Mismatch(
                "requirements",
                f"the engine needs something this version cannot check: {', '.join(sorted(requirements))}",
                "use the enginesmith version that built it, or a newer one",
            )
        )
    return found
