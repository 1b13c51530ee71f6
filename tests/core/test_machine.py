"""What this machine is, from files of other machines."""

import os
from pathlib import Path

import pytest

from exporter.core import machine as this
from exporter.core.machine import cpu_features, cpu_model, cpu_quota, physical_cores, triple


def test_triple_uses_one_name_per_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, name in (("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")):
        monkeypatch.setattr(this.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(this.sys, "platform", "linux")
        assert triple() == f"{name}-linux"


def test_features_of_x86_and_arm(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: other\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert cpu_features(tmp_path / "x86") == {"fpu", "avx2", "fma"}
    assert cpu_features(tmp_path / "arm") == {"fp", "asimd", "sve"}
    assert cpu_features(tmp_path / "none") == frozenset()


def topology(root: Path, siblings: list[str]) -> Path:
    for cpu, text in enumerate(siblings):
        folder = root / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    "text, name",
    [
        ("processor : 0\nmodel name\t: A CPU 9000 \n", "A CPU 9000"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n", "CPU 0x41 0xd0b"),
        ("nothing known\n", this.machine()),
    ],
)
def test_the_name_of_the_cpu(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_model(tmp_path / "cpuinfo") == name


def test_a_system_that_does_not_tell_the_cpu(tmp_path: Path) -> None:
    assert cpu_model(tmp_path / "none") == this.machine()


@pytest.mark.parametrize(
    ("siblings", "allowed", "cores"),
    [
        (["0,2", "1,3", "0,2", "1,3"], {0, 1, 2, 3}, 2),
        (["0,2", "1,3", "0,2", "1,3"], {0, 2}, 1),
        (["0", "1"], {0, 1}, 2),
        ([], {0, 1, 2}, 3),
    ],
)
def test_hyperthreads_and_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: list[str], allowed: set[int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr(this, "TOPOLOGY", topology(tmp_path / "cpu", siblings))
    monkeypatch.setattr(this, "CGROUP", tmp_path / "none")
    assert physical_cores() == cores


def test_the_tightest_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "pod" / "app"
    group.mkdir(parents=True)
    assert cpu_quota(tmp_path, "/pod/app") is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path, "/pod/app") is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, "/pod/app") == 1.5
    (group / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota(tmp_path, "/pod/app") == 0.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(this, "CGROUP", tmp_path)
    monkeypatch.setattr(this, "_own_cgroup", lambda: "/pod")
    monkeypatch.setattr(this, "TOPOLOGY", tmp_path / "none")
    assert physical_cores() == 2


def test_quota_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path, "/") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    assert cpu_quota(tmp_path, "/") == 3.0
