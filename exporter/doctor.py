"""What this machine can do: the checks of `enginesmith doctor`."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata

from exporter.memory import available_bytes
from targets.registry import PLANNED, TARGETS, get_target

# Packages by what they are needed for; versions come from their metadata, nothing is imported.
PACKAGES = {
    "run": ("numpy", "tokenizers", "jinja2", "ml_dtypes"),
    "build": ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"),
}
MIN_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """One finding: `remedy` is empty where nothing needs doing."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""
    required: bool = True


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
    checks = [_python(), _machine()]
    checks += [_package(name, purpose) for purpose, names in PACKAGES.items() for name in names]
    targets = [_target(name) for name in TARGETS]
    checks += targets
    checks += [Check(f"target {n}", False, "planned, not part of this version", required=False) for n in PLANNED]
    running = all(check.passed for check in checks if check.name.startswith("run: "))
    return Diagnosis(tuple(checks), running and any(check.passed for check in targets))


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= MIN_PYTHON
    return Check("python", enough, version, "" if enough else "install Python 3.11 or newer")


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0))
    free = shutil.disk_usage(".").free
    detail = (
        f"{platform.machine()}, {cores} cores, {available_bytes() / 1e9:.1f} GB memory free, {free / 1e9:.0f} GB disk"
    )
    return Check("machine", True, detail)


def _package(name: str, purpose: str) -> Check:
    try:
        return Check(f"{purpose}: {name}", True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(f"{purpose}: {name}", False, "not installed", f"pip install 'enginesmith[{purpose}]'")


def _target(name: str) -> Check:
    target = get_target(name)
    support = target.probe()
    detail = support.why or ", ".join(f"{n} {v}" for n, v in target.versions().items() if v)
    return Check(f"target {name}", support.usable, detail, support.remedy)
