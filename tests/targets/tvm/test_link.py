"""Which linker is taken, and what is said when there is none or it fails."""

import shutil
import sys
from pathlib import Path

import pytest

from exporter.core.device import DeviceOptions
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.machine import machine
from targets.tvm import link
from targets.tvm.devices import DEVICES, resolve_device
from targets.tvm.link import link_command, linker

HERE, NAMED = resolve_device(DeviceOptions()), DEVICES["x86-64-v2" if machine() == "x86_64" else "aarch64"]
ELSEWHERE = DEVICES["raspberry-pi-5" if machine() == "x86_64" else "x86-64-v3"]
ZIG = [sys.executable, "-m", "ziglang", "cc", "-target", f"{ELSEWHERE.machine}-linux-gnu.2.28"]


def test_this_machine_is_linked_by_its_own_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}" if name == "gcc" else None)
    assert link_command(HERE) == ["bin/gcc"]


def test_other_machines_and_named_devices_are_linked_by_zig():
    pytest.importorskip("ziglang", reason="ziglang is not installed: nothing links for other machines")
    assert link_command(ELSEWHERE) == ZIG
    assert link_command(NAMED)[1:4] == ["-m", "ziglang", "cc"]


def test_a_named_device_of_this_machine_does_without_zig(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"bin/{name}" if name == "cc" else None)
    monkeypatch.setattr(link, "find_spec", lambda name: None)
    assert link_command(NAMED) == ["bin/cc"]


def test_zig_stands_in_for_a_missing_compiler(monkeypatch):
    pytest.importorskip("ziglang", reason="ziglang is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert link_command(HERE)[1:4] == ["-m", "ziglang", "cc"]
    assert link.can_link()


def test_without_any_linker_the_remedy_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(link, "find_spec", lambda name: None)
    assert not link.can_link()
    with pytest.raises(UnsupportedError, match="nor ziglang is installed") as error:
        linker(HERE)
    assert "pip install" in error.value.remedy


def test_a_failing_linker_is_quoted(tmp_path: Path):
    (tmp_path / "broken.o").write_bytes(b"no object")
    with pytest.raises(UnsupportedError, match=r"broken\.o") as error:
        linker(HERE)(str(tmp_path / "out.so"), [str(tmp_path / "broken.o")])
    assert error.value.kind == "tvm.link"


def test_a_full_disk_is_told_apart(tmp_path: Path, monkeypatch):
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    with pytest.raises(InputError, match="no space left") as error:
        linker(HERE)(str(tmp_path / "out.so"), [])
    assert error.value.kind == "output.full"
