"""Which numbers stand behind a tensor: precisions from a recipe and from a quantized model agree."""

import numpy as np
import pytest

from calibration.insert_precision import apply_recipe
from calibration.presets import preset
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision
from exporter.core.scattered_rows import row_ranges, rows_of
from exporter.parity.weight_values import (
    RecipeValues,
    StoredValues,
    WeightPrecisions,
    as_float,
    read_whole,
)
from tests.conftest import CheckpointFactory
from tests.support.canonical_llama import canonical_llama


@pytest.mark.parametrize("shape", ["gqa", "tied", "biases"])
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8-weight", "int4-rtn"])
def test_recipe_and_model_agree(shape: str, recipe: str, tiny_checkpoint: CheckpointFactory) -> None:
    config = Checkpoint.open(tiny_checkpoint(shape)).config
    # Groups of 128 divide the widths of the MLP's last matrix only.
    for chosen in (preset(recipe), preset(recipe).with_group_size(128)):
        from_recipe = WeightPrecisions.from_recipe(chosen, config)
        from_model = WeightPrecisions.from_model(apply_recipe(canonical_llama(config, 64), chosen, config))
        for part, name in from_model.by_tensor.keys() | from_recipe.by_tensor.keys():
            assert from_recipe.get(part, name) == from_model.get(part, name), (part, name)
        assert from_recipe.lossless == from_model.lossless == (chosen.linear.kind == "fp32")


def test_rows_are_independent_of_stacking(tiny_checkpoint: CheckpointFactory) -> None:
    """A tensor quantized alone equals its rows in a packed weight: the simulation reads tensors, the build packs."""
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    rows, int4 = WeightRows(checkpoint), Precision("int4", 32)
    names = tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    packed = as_float(rows(CheckpointWeight(names, int4), 0, 128))
    values = RecipeValues(rows, WeightPrecisions({("layer", name): int4 for name in names}))
    alone = np.concatenate([values.read("layer", name, 0, checkpoint.tensors[name].shape[0]) for name in names])
    np.testing.assert_array_equal(packed, alone)


def test_stored_values_are_exact(tiny_checkpoint: CheckpointFactory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    name = "model.layers.0.mlp.up_proj.weight"
    shape = checkpoint.tensors[name].shape
    values = StoredValues(checkpoint)
    whole = read_whole(lambda start, stop: values.read("layer", name, start, stop), shape)
    np.testing.assert_array_equal(whole, checkpoint.read(name).astype(np.float32))


def test_row_ranges_cover_the_ids() -> None:
    table = np.arange(100)[:, None] * 10
    ids = np.array([0, 1, 5, 30, 31, 99])
    assert row_ranges(ids) == [(0, 6), (30, 32), (99, 100)]
    found = rows_of(ids, [table[start:stop] for start, stop in row_ranges(ids)])
    np.testing.assert_array_equal(found[:, 0], ids * 10)
