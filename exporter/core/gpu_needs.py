"""What an engine for GPUs needs of a host, as manifests hold it."""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.core.gpu import version_numbers

LABELS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
KEYS = {
    "toolkit",
    "version",
    "version_compatible",
    "compute_capabilities",
    "hardware_compatible",
    "cuda",
    "min_driver",
    "memory_bytes",
}


@dataclass(frozen=True)
class GpuNeeds:
    """`requirements["gpu"]` of a manifest.

    The engine loads in `toolkit` of exactly `version`, or where it is `version_compatible` of a later one with the same
    major number; on GPUs of the `compute_capabilities`, or where it is `hardware_compatible` of the lowest of them and
    newer; beneath a driver of `min_driver` that serves `cuda`. `memory_bytes`: weights, activations, caches, inputs and
    outputs of the largest step.
    """

    toolkit: str
    version: str
    compute_capabilities: tuple[str, ...]
    version_compatible: bool = False
    hardware_compatible: bool = False
    cuda: str = ""
    min_driver: str = ""
    memory_bytes: int = 0

    def to_json(self) -> dict[str, object]:
        return {**self.__dict__, "compute_capabilities": list(self.compute_capabilities)}

    @classmethod
    def from_json(cls, data: object) -> "GpuNeeds | None":
        """None where the data is not what this version writes."""
        if not isinstance(data, Mapping) or data.keys() != KEYS or data["toolkit"] not in LABELS:
            return None
        capabilities = data["compute_capabilities"]
        strings = ("version", "cuda", "min_driver")
        flags = ("version_compatible", "hardware_compatible")
        valid = (
            isinstance(capabilities, list)
            and bool(capabilities)
            and all(isinstance(one, str) and len(version_numbers(one)) == 2 for one in capabilities)
            and all(isinstance(data[name], str) for name in strings)
            and all(isinstance(data[name], bool) for name in flags)
            and type(data["memory_bytes"]) is int
        )
        return cls(**{**data, "compute_capabilities": tuple(capabilities)}) if valid else None

    @property
    def label(self) -> str:
        return f"{LABELS[self.toolkit]} {self.version}"

    def fits_capability(self, capability: str) -> bool:
        if self.hardware_compatible:
            return version_numbers(capability) >= min(map(version_numbers, self.compute_capabilities))
        return capability in self.compute_capabilities

    def fits_version(self, version: str) -> bool:
        """Numbers alone are compared: packages of one version differ in what follows them (`+cu13`)."""
        here, built = version_numbers(version), version_numbers(self.version)
        if not self.version_compatible:
            return here == built
        return here[:1] == built[:1] and here >= built
