"""Whether an artifact fits this machine."""

from collections.abc import Mapping
from typing import Any

from exporter.artifact.gpu_fit import Mismatch as Mismatch
from exporter.artifact.gpu_fit import gpu_mismatches
from exporter.core.errors import ArtifactError
from exporter.core.gpu import GpuHost, gpu_host
from exporter.core.machine import cpu_features, triple

KNOWN = {"cpu_features", "gpu"}


class HostError(ArtifactError):
    """This machine cannot run an engine, for all of these reasons."""

    def __init__(self, mismatches: list[Mismatch]) -> None:
        messages = "; ".join(mismatch.message for mismatch in mismatches)
        remedies = "; ".join(dict.fromkeys(mismatch.remedy for mismatch in mismatches))
        super().__init__("artifact.host", messages, remedies)
        self.mismatches = mismatches

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "mismatches": [dict(mismatch.__dict__) for mismatch in self.mismatches]}


ANY_MACHINE = "any"
"""The triple of artifacts that are data alone, such as checkpoints."""


def check_host(built_for: str, requirements: Mapping[str, Any], host: GpuHost | None = None) -> list[Mismatch]:
    """Every reason why this machine cannot run an engine of a triple with these requirements; empty when it can.

    `host`: the GPUs, driver and runtimes to compare with, if not this machine's. Nothing is deserialized.
    """
    if built_for not in (ANY_MACHINE, triple()):
        why = f"the engine was built for {built_for}, this is {triple()}"
        return [Mismatch("triple", why, "run it there, or build it again from the checkpoint for a machine like this")]
    found = []
    if missing := sorted(set(requirements.get("cpu_features", [])) - cpu_features()):
        found.append(
            Mismatch(
                "cpu_features",
                f"the engine needs CPU features that this machine lacks: {', '.join(missing)}",
                "run it on a newer CPU, or build it again on this machine",
            )
        )
    if unknown := sorted(requirements.keys() - KNOWN):
        found.append(
            Mismatch(
                "requirements",
                f"the engine needs something this version cannot check: {', '.join(unknown)}",
                "use the enginesmith version that built it, or a newer one",
            )
        )
    if "gpu" in requirements:
        found += gpu_mismatches(requirements["gpu"], host or gpu_host())
    return found
