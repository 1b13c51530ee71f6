"""What computes a step: TensorRT on a GPU, or the engine's own graph on this CPU."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from targets.tensorrt.step_plan import Step


@dataclass(frozen=True)
class StepResult:
    """`logits` float32 [B, V] of each row's last new position, None where no row's were wanted; `hidden`: float32
    [B, S, H] around every layer, where the executor was opened with hidden states."""

    logits: np.ndarray | None
    hidden: tuple[np.ndarray, ...] = ()


class Executor(Protocol):
    """An open engine. The KV cache of all rows is its own, and starts as zeros."""

    def step(self, step: Step, profile: str) -> StepResult:
        """Compute a step with the named optimization profile. What it returns is the caller's to keep."""
        ...

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        ...
