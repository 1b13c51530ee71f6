"""What this machine can do: the checks of `enginesmith doctor`."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from exporter.check import Check as Check
from exporter.core.errors import EngineSmithError
from exporter.core.machine import physical_cores
from exporter.core.packages import installed_version
from exporter.gpu_checks import gpu_checks
from exporter.memory import available_bytes
from targets.registry import TARGETS, get_target

# Packages by what they are needed for; versions come from their metadata, nothing is imported.
PACKAGES = {
    "run": ("numpy", "tokenizers", "jinja2", "ml_dtypes"),
    "build": ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
}
# What one target needs beside that; the others work without.
TARGET_PACKAGES = {"tvm": ("apache-tvm", "apache-tvm-ffi", "ziglang")}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIN_PYTHON = (3, 11)


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `usable` is whether any target can run here."""

    checks: tuple[Check, ...]
    usable: bool

    def to_json(self) -> dict[str, object]:
        return {"usable": self.usable, "checks": [dict(check.__dict__) for check in self.checks]}

    def describe(self) -> str:
        lines = []
        for check in self.checks:
            mark = "ok  " if check.passed else "MISS" if check.required else "--  "
            lines.append(f"{mark} {check.name}: {check.detail}" + (f"\n       {check.remedy}" if check.remedy else ""))
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Look at Python, memory, packages and every target; never raises."""
    checks = [_python(), _machine(), _threads(), _huge_pages()]
    checks += [_package(name, purpose) for purpose, names in PACKAGES.items() for name in names]
    checks += [_package(name, target, False) for target, names in TARGET_PACKAGES.items() for name in names]
    checks.append(_tvm_runtime())
    checks += gpu_checks()
    targets = [_target(name) for name in TARGETS]
    checks += targets
    running = all(check.passed for check in checks if check.name.startswith("run: "))
    return Diagnosis(tuple(checks), running and any(check.passed for check in targets))


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= MIN_PYTHON
    return Check("python", enough, version, "" if enough else "install Python 3.11 or newer")


def _machine() -> Check:
    free = shutil.disk_usage(".").free
    detail = f"{platform.machine()}, {available_bytes() / 1e9:.1f} GB memory free, {free / 1e9:.0f} GB disk"
    return Check("machine", True, detail)


def _threads() -> Check:
    """What engines take by default, and what that comes from."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{physical_cores()} by default: the physical cores of {logical} processors, within the CPU quota"
    return Check("threads", True, detail)


def _huge_pages() -> Check:
    """Weights of the target tvm lie on 2 MB pages where the system gives them on request."""
    try:
        setting = HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        setting = "unavailable"
    if setting in ("always", "madvise"):
        return Check("2 MB pages", True, setting, required=False)
    remedy = f"echo madvise > {HUGE_PAGES}, as root: engines of the target tvm decode faster"
    return Check("2 MB pages", False, setting, remedy, required=False)


def _tvm_runtime() -> Check:
    """The library that engines of the target tvm are loaded with."""
    from targets.tvm.library import runtime_path

    try:
        return Check("tvm: libtvm_runtime", True, runtime_path().name, required=False)
    except EngineSmithError as error:
        return Check("tvm: libtvm_runtime", False, error.message, error.remedy, required=False)


def _package(name: str, purpose: str, required: bool = True) -> Check:
    found = f"{purpose}: {name}"
    if version := installed_version(name):
        return Check(found, True, version, required=required)
    return Check(found, False, "not installed", f"pip install 'enginesmith[{purpose}]'", required)


def _target(name: str) -> Check:
    target = get_target(name)
    support = target.probe()
    versions = ", ".join(f"{n} {v}" for n, v in target.versions().items() if v)
    detail = support.why or versions or "needs no package of its own"
    return Check(f"target {name}", support.usable, detail, support.remedy)
