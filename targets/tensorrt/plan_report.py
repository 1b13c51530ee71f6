"""What a plan is asked to be, and what it became: both are sent to the process that builds and back, as JSON."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.core.engine_options import EngineOptions
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.profiles import Profile

NAMES, DETAILED = "names", "detailed"


@dataclass(frozen=True)
class EngineRequest:
    """One build. `verbosity`: whether the builder and an inspector tell the kernels' names alone, or their types too;
    plans of TensorRT-RTX have the same size either way."""

    device: BuildDevice
    profiles: tuple[Profile, ...]
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: Path | None = None
    verbosity: str = DETAILED

    @classmethod
    def of(cls, device: BuildDevice, profiles: tuple[Profile, ...], options: EngineOptions) -> "EngineRequest":
        """What the command line asks for, once `resolve_device` has accepted it."""
        return cls(device, profiles, options.version_compatible, options.hardware_compatible, options.timing_cache)

    @property
    def flags(self) -> list[str]:
        """The options that are in force, for manifests."""
        values = {
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
            "timing_cache": self.timing_cache is not None,
        }
        return [name for name, value in values.items() if value]

    def to_json(self) -> dict[str, Any]:
        cache = str(self.timing_cache) if self.timing_cache else None
        profiles = [profile.__dict__ for profile in self.profiles]
        return {**self.__dict__, "device": self.device.__dict__, "profiles": profiles, "timing_cache": cache}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EngineRequest":
        device = {**data["device"], "capabilities": tuple(data["device"]["capabilities"])}
        profiles = tuple(
            Profile(one["name"], _range(one["batch"]), _range(one["sequence"])) for one in data["profiles"]
        )
        cache = Path(data["timing_cache"]) if data["timing_cache"] else None
        return cls(**{**data, "device": BuildDevice(**device), "profiles": profiles, "timing_cache": cache})


def _range(values: list[int]) -> tuple[int, int, int]:
    least, usual, most = values
    return least, usual, most


@dataclass(frozen=True)
class PlanReport:
    """One plan. `layers` is what targets.tensorrt.layer_report read from the network, `kernels` what
    targets.tensorrt.kernel_report read of the compiled engine (nothing where it told none); `requirements` goes into
    the manifest as `requirements["gpu"]`.

    `activation_bytes` and `weights_bytes` are the builder's own figures (0 where it told none); `input_bytes` counts
    caches, inputs and outputs of the largest step; `peak_bytes` is what the process that built held resident.
    """

    toolkit: str
    version: str
    built_by: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    flags: list[str]
    layers: dict[str, Any]
    kernels: dict[str, Any]
    plan_bytes: int
    weights_bytes: int
    activation_bytes: int
    input_bytes: int
    requirements: dict[str, object]
    seconds: float = 0.0
    peak_bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        profiles = [profile.__dict__ for profile in self.profiles]
        return {**self.__dict__, "compute_capabilities": list(self.compute_capabilities), "profiles": profiles}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PlanReport":
        profiles = tuple(
            Profile(one["name"], _range(one["batch"]), _range(one["sequence"])) for one in data["profiles"]
        )
        return cls(**{**data, "compute_capabilities": tuple(data["compute_capabilities"]), "profiles": profiles})

    def manifest_facts(self) -> dict[str, Any]:
        """What a manifest says of the engine: facts that two builds share, without times and memory of the build."""
        left_out = {"requirements", "seconds", "peak_bytes", "warnings"}
        return {name: value for name, value in self.to_json().items() if name not in left_out}
