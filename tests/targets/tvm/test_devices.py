"""Devices: what they compile with, what they need of a CPU, and which requests are refused."""

import platform
import re
from pathlib import Path
from typing import Any

import pytest

from exporter.core import machine as this_machine
from exporter.core.device import DeviceOptions
from exporter.core.errors import InputError, UnsupportedError
from targets.tvm.cpus import CPUINFO, CPUS
from targets.tvm.devices import DEVICES, Device, device_names, resolve_device
from targets.tvm.isa import PROFILES, profile

ZEN4 = frozenset(profile("x86-64-v4-vnni").cpu_features)
HASWELL = frozenset(profile("x86-64-v3").cpu_features)
# The "Features" line of the real machines.
PI_4_LINE = "fp asimd evtstrm crc32 cpuid"
PI_5_LINE = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
GRAVITON3_LINE = (
    f"{PI_5_LINE} jscvt fcma sha3 sm3 sm4 sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm "
    "svebf16 i8mm bf16 dgh rng"
)
RASPBERRY_PI_4, RASPBERRY_PI_5, GRAVITON3 = (frozenset(line.split()) for line in (PI_4_LINE, PI_5_LINE, GRAVITON3_LINE))


def llvm_features_of(device: dict[str, object]) -> set[str]:
    tvm = pytest.importorskip("tvm")
    from tvm.target import codegen

    return {str(name) for name in codegen.llvm_get_cpu_features(tvm.target.Target(device))}


@pytest.mark.parametrize("name", CPUS)
def test_cpus_are_what_llvm_takes_them_for(name: str) -> None:
    cpu = CPUS[name]
    known = CPUINFO[cpu.machine]
    found = llvm_features_of({"kind": "llvm", "mtriple": f"{cpu.machine}-linux-gnu", "mcpu": name})
    assert {feature for feature in found if feature in known} == cpu.features


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_an_engine_states_every_feature_that_llvm_may_use(device: Device) -> None:
    known = CPUINFO[device.machine]
    found = llvm_features_of(device.tvm_target())
    proofs = {name for feature in found if feature in known for name in known[feature]}
    assert proofs <= set(device.cpu_features)
    assert set(device.isa.cpu_features) <= set(device.cpu_features)
    assert list(device.cpu_features) == sorted(set(device.cpu_features))


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("raspberry-pi-4", RASPBERRY_PI_4),
        ("raspberry-pi-5", RASPBERRY_PI_5),
        ("graviton2", RASPBERRY_PI_5),
        ("ampere-altra", RASPBERRY_PI_5),
        ("graviton3", GRAVITON3),
    ],
)
def test_boards_have_what_their_engines_need(name: str, features: frozenset[str]) -> None:
    assert set(DEVICES[name].cpu_features) <= features
    assert DEVICES[name].triple == "aarch64-linux"


@pytest.mark.parametrize(
    ("machine", "features", "isa"),
    [
        ("x86_64", ZEN4, "x86-64-v4-vnni"),
        ("x86_64", HASWELL | {"avx_vnni"}, "x86-64-v3-vnni"),
        ("x86_64", HASWELL, "x86-64-v3"),
        ("aarch64", RASPBERRY_PI_5, "aarch64-dotprod"),
        ("aarch64", RASPBERRY_PI_4, "aarch64-neon"),
        ("aarch64", GRAVITON3, "aarch64-i8mm"),
    ],
)
def test_the_host_gets_its_best_profile(machine: str, features: frozenset[str], isa: str) -> None:
    for options in (DeviceOptions(), DeviceOptions(device="host")):
        device = resolve_device(options, machine, features)
        assert (device.name, device.isa.name, device.machine) == ("host", isa, machine)


def test_names_resolve_whatever_this_machine_is() -> None:
    assert set(device_names()) == {"host", *DEVICES}
    for name in DEVICES:
        assert resolve_device(DeviceOptions(device=name), "riscv64", frozenset()) is DEVICES[name]


def test_a_device_is_foreign_by_triple_or_by_features(monkeypatch: pytest.MonkeyPatch) -> None:
    pi = DEVICES["raspberry-pi-5"]
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(this_machine, "cpu_features", lambda: ZEN4 | {"pni"})
    assert pi.foreign and not DEVICES["x86-64-v4"].foreign and DEVICES["x86-64-v3-vnni"].foreign
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(this_machine, "cpu_features", lambda: RASPBERRY_PI_5)
    assert not pi.foreign and DEVICES["x86-64-v2"].foreign and DEVICES["graviton3"].foreign


@pytest.mark.parametrize(
    ("options", "isa", "target"),
    [
        (
            {"mcpu": "znver4"},
            "x86-64-v4-vnni",
            {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4", "mattr": []},
        ),
        (
            {"mtriple": "aarch64-unknown-linux-gnu", "mattr": ("+dotprod", "+fullfp16")},
            "aarch64-dotprod",
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+dotprod", "+fullfp16"]},
        ),
        (
            {"mcpu": "neoverse-v1", "mattr": ("-i8mm", "-sve")},
            "aarch64-dotprod",
            {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-v1", "mattr": ["-i8mm", "-sve"]},
        ),
        ({"mattr": ("+avx", "+avx2", "+fma")}, "x86-64-v2", None),
    ],
)
def test_llvm_words_choose_the_best_profile(options: dict[str, Any], isa: str, target: object) -> None:
    device = resolve_device(DeviceOptions(**options), "x86_64", frozenset())
    assert device.isa is PROFILES[isa]
    assert target is None or device.tvm_target() == target
    assert set(device.isa.cpu_features) <= set(device.cpu_features)


def test_features_taken_away_are_not_needed() -> None:
    with_sve = resolve_device(DeviceOptions(mcpu="neoverse-v1"), "x86_64", frozenset())
    without = resolve_device(DeviceOptions(mcpu="neoverse-v1", mattr=("-sve",)), "x86_64", frozenset())
    assert set(with_sve.cpu_features) - set(without.cpu_features) == {"sve"}


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({"device": "raspberry-pi-9"}, "device.unknown", "graviton3"),
        ({"mcpu": "pentium"}, "device.mcpu", "znver4"),
        ({"mtriple": "x86_64-linux-gnu", "mcpu": "cortex-a76"}, "device.mcpu", "x86-64-v3"),
        ({"mattr": ("avx2",)}, "device.mattr", "+avx2"),
        ({"mattr": ("+warp",)}, "device.mattr", "+avx2"),
    ],
)
def test_unknown_names_are_bad_input_and_list_the_known(options: dict[str, Any], kind: str, names: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_device(DeviceOptions(**options), "x86_64", ZEN4)
    assert caught.value.kind == kind and names in caught.value.remedy


@pytest.mark.parametrize(
    "mtriple", ["riscv64-linux-gnu", "x86_64-pc-windows-msvc", "arm64-apple-darwin", "x86_64-linux-musl", "x86_64", ""]
)
def test_other_systems_are_refused(mtriple: str) -> None:
    options = DeviceOptions(mtriple=mtriple or "-")
    with pytest.raises(UnsupportedError, match="cannot be built") as caught:
        resolve_device(options, "x86_64", ZEN4)
    assert caught.value.kind == "device.mtriple" and "aarch64-linux-gnu" in caught.value.remedy


def test_a_machine_without_a_profile_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="riscv64") as caught:
        resolve_device(DeviceOptions(), "riscv64", frozenset())
    assert caught.value.kind == "device.profile"


def test_options_contradict_or_leave_their_range() -> None:
    with pytest.raises(InputError) as caught:
        DeviceOptions(device="graviton3", mcpu="neoverse-v1")
    assert caught.value.kind == "usage.device"
    for minutes in (-1.0, float("nan"), 1e9):
        with pytest.raises(InputError) as caught:
            DeviceOptions(tune_minutes=minutes)
        assert caught.value.kind == "usage.tune"


def test_the_page_lists_the_devices_as_they_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\w-]+) \| ([\w-]+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(d.name, d.isa.name, d.mcpu, d.summary) for d in DEVICES.values()]
