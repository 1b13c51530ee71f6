"""The devices that engines are built for: this machine, named boards and servers, or LLVM's own words."""

from collections.abc import Iterable
from dataclasses import dataclass

from exporter.core import machine as this_machine
from exporter.core.device import DeviceOptions
from exporter.core.errors import InputError, UnsupportedError
from targets.tvm.cpus import CPUINFO, CPUS, cpuinfo_names
from targets.tvm.isa import PROFILES, Isa, best_profile, profile

HOST = "host"
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
# Scalable vectors: the kernels are written for 128 bits.
NO_SVE = ("-sve",)


@dataclass(frozen=True)
class Device:
    """A machine to compile for. `mcpu` and `mattr` are LLVM's words; the kernels are those of `isa`."""

    name: str
    mtriple: str
    isa: Isa
    mcpu: str
    mattr: tuple[str, ...]
    summary: str

    @property
    def machine(self) -> str:
        return self.isa.machine

    @property
    def triple(self) -> str:
        """Machine and system as manifests name them: `aarch64-linux`."""
        return f"{self.machine}-linux"

    @property
    def cpu_features(self) -> tuple[str, ...]:
        """All that an engine may use of a CPU, sorted, as /proc/cpuinfo names it."""
        may_emit = cpuinfo_names(self.machine, llvm_features(self.machine, self.mcpu, self.mattr))
        return tuple(sorted(may_emit | set(self.isa.cpu_features)))

    @property
    def foreign(self) -> bool:
        """Whether this machine cannot run what is built for the device."""
        return self.triple != this_machine.triple() or not this_machine.cpu_features() >= set(self.cpu_features)

    def tvm_target(self) -> dict[str, object]:
        """What `tvm.target.Target` takes."""
        return {"kind": "llvm", "mtriple": self.mtriple, "mcpu": self.mcpu, "mattr": list(self.mattr)}


def _of_profile(name: str, isa: str, summary: str) -> Device:
    found = profile(isa)
    return Device(name, f"{found.machine}-linux-gnu", found, found.mcpu, found.mattr, summary)


def _board(name: str, isa: str, mcpu: str, summary: str, mattr: tuple[str, ...] = ()) -> Device:
    return Device(name, "aarch64-linux-gnu", profile(isa), mcpu, mattr, summary)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _of_profile("x86-64-v4", "x86-64-v4-vnni", "AVX-512 with VNNI: Ice Lake, Zen 4 and newer"),
        _of_profile("x86-64-v3-vnni", "x86-64-v3-vnni", "AVX2 with AVX-VNNI: Alder Lake and newer"),
        _of_profile("x86-64-v3", "x86-64-v3", "AVX2 and FMA: Haswell, Zen and newer"),
        _of_profile("x86-64-v2", "x86-64-v2", "SSE 4.2: any x86-64 CPU since 2009"),
        _of_profile("aarch64", "aarch64-neon", "any 64-bit Arm"),
        _of_profile("aarch64-dotprod", "aarch64-dotprod", "Armv8.2 with dot products"),
        _of_profile("aarch64-i8mm", "aarch64-i8mm", "Armv8.6 with 8-bit matrix products"),
        _board("raspberry-pi-4", "aarch64-neon", "cortex-a72", "Cortex-A72"),
        _board("raspberry-pi-5", "aarch64-dotprod", "cortex-a76", "Cortex-A76, dot products"),
        _board("jetson-orin", "aarch64-dotprod", "cortex-a78ae", "Cortex-A78AE, dot products (its CPU)"),
        _board("graviton2", "aarch64-dotprod", "neoverse-n1", "Neoverse N1, dot products"),
        _board("graviton3", "aarch64-i8mm", "neoverse-v1", "Neoverse V1, 8-bit matrix products", NO_SVE),
        _board("ampere-altra", "aarch64-dotprod", "neoverse-n1", "Neoverse N1, dot products"),
    )
}


def device_names() -> dict[str, str]:
    """What `--device` takes, each with one sentence."""
    return {HOST: "this machine (default)", **{name: device.summary for name, device in DEVICES.items()}}


def resolve_device(
    options: DeviceOptions, machine: str | None = None, features: frozenset[str] | None = None
) -> Device:
    """The device that options ask for. `machine`, `features`: those of this machine, if not given.

    Raises InputError for unknown names, UnsupportedError for a machine that no profile fits.
    """
    machine = machine or this_machine.machine()
    features = this_machine.cpu_features() if features is None else features
    if options.mtriple or options.mcpu or options.mattr:
        return _described(options, machine)
    if options.device not in (None, HOST):
        if options.device not in DEVICES:
            raise InputError("device.unknown", f"device {options.device!r} is unknown", _choices(device_names()))
        return DEVICES[options.device]
    isa = best_profile(machine, features.__contains__)
    if isa is None:
        raise _no_profile(f"this machine ({machine})")
    return _of_profile(HOST, isa.name, f"this machine, as {isa.name}")


def _described(options: DeviceOptions, host: str) -> Device:
    """A device in LLVM's words: the best profile of what the CPU's name and the features promise."""
    machine = _machine_of(options.mtriple, options.mcpu, host)
    mcpu = options.mcpu or ("generic" if machine == "aarch64" else "x86-64-v2")
    if mcpu not in CPUS or CPUS[mcpu].machine != machine:
        known = sorted(name for name, cpu in CPUS.items() if cpu.machine == machine)
        raise InputError("device.mcpu", f"--mcpu {mcpu!r} is not a known {machine} CPU", _choices(known))
    found = cpuinfo_names(machine, llvm_features(machine, mcpu, options.mattr))
    isa = best_profile(machine, found.__contains__)
    if isa is None:
        raise _no_profile(f"--mcpu {mcpu} with {','.join(options.mattr) or 'no further features'}")
    name = "+".join([mcpu, *(attribute.lstrip("+") for attribute in options.mattr)])
    return Device(name, f"{machine}-linux-gnu", isa, mcpu, options.mattr, f"{mcpu}, as {isa.name}")


def _machine_of(mtriple: str | None, mcpu: str | None, host: str) -> str:
    """The machine of a triple `ARCHITECTURE[-VENDOR]-linux[-gnu]`; without one that of the CPU, or this one."""
    if mtriple is None:
        named = {name: cpu.machine for name, cpu in CPUS.items() if name != "generic"}
        return named.get(mcpu or "", host)
    architecture, *rest = mtriple.lower().split("-")
    system = [part for part in rest if part not in ("unknown", "pc", "none")]
    if architecture not in MACHINES or system not in (["linux"], ["linux", "gnu"]):
        raise UnsupportedError(
            "device.mtriple",
            f"engines cannot be built for {mtriple!r}",
            "use x86_64-linux-gnu or aarch64-linux-gnu; TVM's runtime is needed there",
        )
    return MACHINES[architecture]


def llvm_features(machine: str, mcpu: str, mattr: tuple[str, ...]) -> frozenset[str]:
    """LLVM's features, of those in CPUINFO, that a CPU has after `+feature` and `-feature` in this order."""
    found = set(CPUS[mcpu].features)
    for attribute in mattr:
        sign, feature = attribute[:1], attribute[1:]
        if sign not in "+-" or feature not in CPUINFO[machine]:
            choices = _choices(f"+{known}" for known in CPUINFO[machine])
            raise InputError("device.mattr", f"--mattr {attribute!r} is not a known feature of {machine}", choices)
        if sign == "+":
            found.add(feature)
        else:
            found.discard(feature)
    return frozenset(found)


def _choices(names: Iterable[str]) -> str:
    return f"use one of {', '.join(names)}"


def _no_profile(what: str) -> UnsupportedError:
    return UnsupportedError("device.profile", f"no kernels are written for {what}", f"profiles: {', '.join(PROFILES)}")
