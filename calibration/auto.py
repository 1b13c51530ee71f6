"""The recipe `auto`: precisions chosen layer by layer within a budget, from what each costs in quality."""

from dataclasses import dataclass

from calibration.data import CalibrationData
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import UnsupportedError
from exporter.core.progress import Progress
from exporter.core.recipe import Recipe

NAME = "auto"


@dataclass(frozen=True)
class AutoBudget:
    """At most one is given: bits per weight with scales, bytes of all weights, or mean KL to the original."""

    target_bits: float | None = None
    target_bytes: int | None = None
    max_kl: float | None = None

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.target_bits, self.target_bytes, self.max_kl))


def resolve(
    checkpoint: Checkpoint, recipe: Recipe, data: CalibrationData, budget: AutoBudget, progress: Progress
) -> Recipe:
    """The recipe with an override for every layer, within the budget."""
    raise UnsupportedError("recipe.auto", "the recipe auto is not available yet", "choose a recipe of one precision")
