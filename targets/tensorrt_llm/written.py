"""What writing a checkpoint leaves."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Written:
    """Files relative to the directory, bytes of weight data alone, and facts for the manifest."""

    files: list[str]
    weights_bytes: int
    report: dict[str, Any] = field(default_factory=dict)
