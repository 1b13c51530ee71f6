"""Whether an artifact fits this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.core.machine import cpu_features, triple


@dataclass(frozen=True)
class Mismatch:
    """One reason why an engine does not run here: `what` is `triple`, `cpu_features` or `requirements`."""

    what: str
    message: str
    remedy: str


def check_host(built_for: str, requirements: Mapping[str, Any]) -> list[Mismatch]:
    """Every reason why this machine cannot run an engine of a triple with these requirements; empty when it can."""
    if built_for != triple():
        why = f"the engine was built for {built_for}, this is {triple()}"
        return [Mismatch("triple", why, "run it there, or build it again from the checkpoint for a machine like this")]
    found = []
    known = {"cpu_features"}
    if missing := sorted(set(requirements.get("cpu_features", [])) - cpu_features()):
        found.append(
            Mismatch(
                "cpu_features",
                f"the engine needs CPU features that this machine lacks: {', '.join(missing)}",
                "run it on a newer CPU, or build it again on this machine",
            )
        )
    if unknown := sorted(requirements.keys() - known):
        found.append(
            Mismatch(
                "requirements",
                f"the engine needs something this version cannot check: {', '.join(unknown)}",
                "use the enginesmith version that built it, or a newer one",
            )
        )
    return found
