"""Insert a recipe's precisions into the canonical model: between weights and their uses, and before matrices."""

import math
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from calibration.coverage import actual_precision, check_layers
from calibration.insert_rounding import RoundInputs
from calibration.insert_weights import InsertWeights
from exporter.core.canonical import CanonicalModel, CheckpointWeight, ScaleValue, Slice, Weight
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.recipe import Precision, Recipe

Precisions = dict[str, Precision]
"""The actual precision of each matrix of a slice, by its logical name (`mlp.gate_up_proj.weight`)."""


def apply_recipe(
    model: CanonicalModel, recipe: Recipe, config: ModelConfig, input_scales: Mapping[str, float] | None = None
) -> CanonicalModel:
    """The same model with the recipe's precisions; `model` is left as it is.

    Layers that share a structure and ask for the same still share one afterwards. Norms, biases and rotary tables stay
    fp32, and so do matrices whose width the group size does not divide (`calibration.coverage` lists them).
    `input_scales` holds the scale of the input of each module (`model.layers.0.self_attn.q_proj`, `lm_head`) whose
    precision has one from calibration. `config` may say that the head is a tensor of its own where `model` has it tied.
    """
    check_layers(config, recipe)
    converted: dict[tuple[int, tuple[tuple[str, Precision], ...]], ir.Model] = {}

    def convert(part: Slice) -> Slice:
        weights = _with_head_source(part, config)
        precisions = _precisions(part, weights, recipe, config)
        key = (id(part.structure), tuple(sorted(precisions.items(), key=lambda item: item[0])))
        if key not in converted:
            converted[key] = _convert_structure(part.structure, precisions)
        return Slice(part.kind, part.index, converted[key], _with_precisions(weights, precisions, input_scales or {}))

    return CanonicalModel(convert(model.embedding), [convert(layer) for layer in model.layers], convert(model.head))


def _with_head_source(part: Slice, config: ModelConfig) -> dict[str, Weight]:
    """A head tied in the checkpoint may have weights of its own after its transforms."""
    head = part.weights.get("lm_head.weight")
    if part.kind != "head" or not isinstance(head, CheckpointWeight):
        return part.weights
    return {**part.weights, "lm_head.weight": replace(head, sources=(config.head_source,))}


def _precisions(part: Slice, weights: dict[str, Weight], recipe: Recipe, config: ModelConfig) -> Precisions:
    return {
        name: actual_precision(_requested(part, weight, recipe), config.tensor_shapes[weight.sources[0]][1])
        for name, weight in weights.items()
        if isinstance(weight, CheckpointWeight) and len(config.tensor_shapes[weight.sources[0]]) == 2
    }


def _requested(part: Slice, weight: CheckpointWeight, recipe: Recipe) -> Precision:
    """What the recipe asks of a matrix: stacked ones ask the same for all their parts (`check_layers`)."""
    if part.kind == "embedding":
        return recipe.embedding.weight_only
    if part.kind == "head":
        return recipe.lm_head
    assert part.index is not None
    return recipe.layer_precision(part.index, _module(weight).removeprefix(f"model.layers.{part.index}."))


def _module(weight: CheckpointWeight) -> str:
    """`model.layers.0.self_attn.q_proj` for a weight that starts with that matrix."""
    return weight.sources[0].removesuffix(".weight")


def _convert_structure(structure: ir.Model, precisions: Precisions) -> ir.Model:
    """The passes, in order: the second one finds matrices by the names that the first one leaves."""
    stored = InsertWeights(precisions)(structure.clone()).model
    return RoundInputs({name: p.activations for name, p in precisions.items() if p.activations})(stored).model


def _with_precisions(
    weights: dict[str, Weight], precisions: Precisions, input_scales: Mapping[str, float]
) -> dict[str, Weight]:
    """What feeds the converted structure."""
    fed: dict[str, Weight] = {}
    for name, weight in weights.items():
        precision = precisions.get(name)
        fed[name] = weight
        if precision is not None and isinstance(weight, CheckpointWeight):
            fed[name] = replace(weight, precision=precision)
            if precision.activations.endswith("/tensor"):
                module = "lm_head" if name == "lm_head.weight" else _module(weight)
                fed[f"{name}.input_scale"] = ScaleValue(_input_scale(module, precision, input_scales))
    return fed


def _input_scale(module: str, precision: Precision, input_scales: Mapping[str, float]) -> float:
    scale = input_scales.get(module)
    if scale is not None and 0 < scale < math.inf:
        return scale
    found = "there is none" if scale is None else f"it is {scale}"
    raise InputError(
        "recipe.input_scale",
        f"{precision.describe()} needs the calibrated scale of the input of {module}, and {found}",
        "calibrate with this recipe: give --calibration FILE, or --qparams with the file of such a calibration",
    )
