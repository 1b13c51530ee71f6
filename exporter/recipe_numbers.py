"""Where the numbers of a recipe come from: the checkpoint alone, or a file of quantization parameters beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from calibration.labelled_codes import labelled_codes
from calibration.qparams import QParams
from calibration.transformed import with_transforms
from calibration.weight_rows import StoredWeights, WeightRows
from exporter.core.checkpoint import Checkpoint
from exporter.core.labelled import LabelledCheckpoint
from exporter.core.recipe import Recipe
from targets.base import RowReader, Target


@dataclass(frozen=True)
class RecipeNumbers:
    """What a build quantizes with, and what the simulation of its engine is made of.

    `checkpoint` has the recipe's transforms, `rows` reads its weights at their precision; `input_scales` are those of
    activations rounded with one scale from calibration, by module (`model.layers.0.self_attn.q_proj`), `kv_scales`
    those of a layer's keys and values.
    """

    checkpoint: Checkpoint
    rows: RowReader
    input_scales: Mapping[str, float] = field(default_factory=dict)
    kv_scales: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def served(self, target: Target, recipe: Recipe, form: str | None) -> "RecipeNumbers":
        """With rows as the target's files hold them."""
        return replace(self, rows=target.served_rows(self.rows, recipe, form))


def plain_numbers(checkpoint: Checkpoint, threads: int = 0) -> RecipeNumbers:
    """Those of a recipe without calibration: weights rounded to nearest."""
    return RecipeNumbers(checkpoint, WeightRows(checkpoint, threads or None))


def calibrated_numbers(
    checkpoint: Checkpoint, recipe: Recipe, parameters: QParams, target: Target, threads: int = 0
) -> RecipeNumbers:
    """Those of a file of quantization parameters: its transforms, its codes, its scales of activations and caches.

    Matrices that have no codes there at the recipe's precision are rounded to nearest, after the transforms. Raises
    InputError where recipe or target ask for a scale whose statistics are not in the file.
    """
    transformed = with_transforms(checkpoint, parameters.transforms)
    rows = WeightRows(transformed, threads or None, _stored(checkpoint, parameters))
    scales = _input_scales(transformed, recipe, parameters)
    return RecipeNumbers(transformed, rows, scales, _kv_scales(checkpoint, recipe, parameters, target))


def _stored(checkpoint: Checkpoint, parameters: QParams) -> StoredWeights:
    """The file's codes; those of the labels' rows where the checkpoint's head has no others."""
    if isinstance(checkpoint, LabelledCheckpoint):
        return labelled_codes(parameters, checkpoint, parameters.transforms)
    return parameters


def _input_scales(checkpoint: Checkpoint, recipe: Recipe, parameters: QParams) -> dict[str, float]:
    scales = {}
    for layer in range(checkpoint.config.num_layers):
        for name in checkpoint.config.linear_shapes:
            asked = recipe.layer_precision(layer, name).activations
            if asked.endswith("/tensor"):
                module = f"model.layers.{layer}.{name}"
                scales[module] = parameters.input_scale(module, asked)
    if recipe.lm_head.activations.endswith("/tensor"):
        scales["lm_head"] = parameters.input_scale("lm_head", recipe.lm_head.activations)
    return scales


def _kv_scales(
    checkpoint: Checkpoint, recipe: Recipe, parameters: QParams, target: Target
) -> dict[int, tuple[float, float]]:
    kind = recipe.kv_cache
    if kind != "fp8" and kind not in target.calibrated_caches:
        return {}
    return {layer: parameters.kv_scales(layer, kind) for layer in range(checkpoint.config.num_layers)}
