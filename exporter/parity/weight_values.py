"""The numbers behind a checkpoint tensor: as stored, or as a recipe rounds them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from calibration.coverage import actual_precision
from exporter.core.canonical import CanonicalModel, CheckpointWeight, Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows, read_tensor_rows, row_chunks
from targets.base import ActivationRounding, RowReader

RoundingOf = Callable[[Precision], ActivationRounding | None]
"""How the inputs of a matrix of that precision are rounded: `Target.activation_rounding`, or what the recipe asks."""


class WeightValues(Protocol):
    """Rows of one tensor as float32; `part` is `embedding`, `layer` or `head` (a tied matrix serves two parts)."""

    def read(self, part: str, name: str, start: int, stop: int) -> np.ndarray: ...

    def precision(self, part: str, name: str) -> Precision: ...


@dataclass(frozen=True)
class StoredValues:
    """The checkpoint's own values."""

    checkpoint: Checkpoint

    def read(self, part: str, name: str, start: int, stop: int) -> np.ndarray:
        return read_tensor_rows(self.checkpoint, name, start, stop)

    def precision(self, part: str, name: str) -> Precision:
        return Precision()


@dataclass(frozen=True)
class WeightPrecisions:
    """The precision each tensor gets; what is not listed stays fp32."""

    by_tensor: Mapping[tuple[str, str], Precision] = field(default_factory=dict)

    @staticmethod
    def from_model(model: CanonicalModel) -> "WeightPrecisions":
        """What the slices of a quantized canonical model say."""
        return WeightPrecisions({key: p for piece in model.slices for key, p in _slice_precisions(piece)})

    @staticmethod
    def from_recipe(recipe: Recipe, config: ModelConfig) -> "WeightPrecisions":
        """The same from the recipe alone: matrices whose width the group size does not divide stay fp32."""
        wanted: dict[tuple[str, str], tuple[Precision, int]] = {
            ("embedding", "model.embed_tokens.weight"): (recipe.embedding, config.hidden_size),
            ("head", config.head_source): (recipe.lm_head, config.hidden_size),
        }
        for layer in range(config.num_layers):
            for name, (_, width) in config.linear_shapes.items():
                asked = recipe.layer_precision(layer, name)
                wanted[("layer", f"model.layers.{layer}.{name}.weight")] = (asked, width)
        return WeightPrecisions({key: actual_precision(p, width) for key, (p, width) in wanted.items()})

    def get(self, part: str, name: str) -> Precision:
        return self.by_tensor.get((part, name), Precision())

    @property
    def lossless(self) -> bool:
        return all(precision.kind == "fp32" for precision in self.by_tensor.values())

    def rounding(self, rounding: RoundingOf) -> RoundingOf | None:
        """The same rounding of activations; None where it leaves the inputs of every matrix alone."""
        matrices = (precision for (part, _), precision in self.by_tensor.items() if part != "embedding")
        return rounding if any(rounding(precision) for precision in matrices) else None


def _slice_precisions(piece: Slice) -> Iterator[tuple[tuple[str, str], Precision]]:
    for weight in piece.weights.values():
        if isinstance(weight, CheckpointWeight):
            for source in weight.sources:
                yield (piece.kind, source), weight.precision


@dataclass(frozen=True)
class RecipeValues:
    """The values a recipe leaves: rounded by `rows` exactly as in the build, then made float32 again."""

    rows: RowReader
    precisions: WeightPrecisions

    def read(self, part: str, name: str, start: int, stop: int) -> np.ndarray:
        weight = CheckpointWeight((name,), self.precisions.get(part, name))
        return as_float(self.rows(weight, start, stop))

    def precision(self, part: str, name: str) -> Precision:
        return self.precisions.get(part, name)


def as_float(rows: "np.ndarray | QuantizedRows") -> np.ndarray:
    """float32 values of rows at any precision."""
    if isinstance(rows, QuantizedRows):
        return rows.dequantize()
    return rows if rows.dtype == np.float32 else rows.astype(np.float32)


def read_whole(read: Callable[[int, int], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of `shape` filled chunk by chunk, so that no second copy of it exists on the way."""
    out = np.empty(shape, np.float32)
    for start, stop in row_chunks(shape):
        out[start:stop] = read(start, stop)
    return out
