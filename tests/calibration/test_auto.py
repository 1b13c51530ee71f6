"""What the recipe `auto` makes of measured units."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from calibration.auto import CANDIDATES, SCALE_BITS, AutoBudget, choose
from calibration.coverage import coverage, plain_matrix_bits
from calibration.presets import preset
from calibration.sensitivity import Unit
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import BudgetError
from exporter.core.recipe import Precision
from tests.support.tiny import write_checkpoint

POINTS = {
    "attention_input": ("q_proj", "k_proj", "v_proj"),
    "attention_output": ("o_proj",),
    "mlp_input": ("gate_proj", "up_proj"),
    "mlp_hidden": ("down_proj",),
}


def checkpoint_of(tmp_path: Path, shape: str) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path, shape, hidden_size=128, intermediate_size=256, head_dim=32))


def units_of(checkpoint: Checkpoint, sensitive: str) -> list[Unit]:
    """Every unit costs 4^-bits, one of them a thousand times that."""

    def unit(name: str, tensors: tuple[str, ...]) -> Unit:
        weight = 1000.0 if name == sensitive else 1.0
        costs = {p: weight * 4.0**-p.bits * (1 + (p.group_size or 0) / 256) for p in CANDIDATES}
        return Unit(name, tensors, costs)

    units = [unit("embedding", ("model.embed_tokens.weight",)), unit("head", ("lm_head.weight",))]
    for layer in range(checkpoint.config.num_layers):
        for point, names in POINTS.items():
            room = "self_attn" if point.startswith("attention") else "mlp"
            tensors = tuple(f"model.layers.{layer}.{room}.{name}.weight" for name in names)
            units.append(unit(f"layers.{layer}.{point}", tensors))
    return units


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("bits", [4.2, 4.5, 5.0, 6.5])
def test_bits_per_weight_are_those_of_coverage_and_within_the_target(tmp_path: Path, shape: str, bits: float) -> None:
    checkpoint = checkpoint_of(tmp_path, shape)
    units = units_of(checkpoint, "layers.1.mlp_hidden")
    found = choose(checkpoint, preset("auto"), units, AutoBudget(target_bits=bits))
    assert found.bits_per_weight <= bits
    matrix_bits = partial(plain_matrix_bits, scale_bits=SCALE_BITS)
    counted = coverage(checkpoint.config, found.recipe, matrix_bits).bits_per_weight
    assert counted == pytest.approx(found.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("point", list(POINTS))
def test_the_sensitive_unit_gets_more_bits_than_the_others(tmp_path: Path, point: str) -> None:
    checkpoint = checkpoint_of(tmp_path, "gqa")
    found = choose(checkpoint, preset("auto"), units_of(checkpoint, f"layers.1.{point}"), AutoBudget(4.8)).recipe
    sensitive = {found.layer_precision(1, f"{_room(point)}.{name}") for name in POINTS[point]}
    others = {found.layer_precision(0, f"{_room(point)}.{name}") for name in POINTS[point]}
    assert len(sensitive) == len(others) == 1
    assert min(p.bits for p in sensitive) > max(p.bits for p in others)


def test_a_tied_table_gets_one_precision(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "tied")
    found = choose(checkpoint, preset("auto"), units_of(checkpoint, "head"), AutoBudget(5.2)).recipe
    assert found.lm_head == found.embedding
    assert found.lm_head.bits > 4


def test_what_an_algorithm_mends_gets_fewer_bits(tmp_path: Path) -> None:
    """GPTQ mends layers, not the embedding: the same costs give the embedding more bits with it than without."""
    checkpoint = checkpoint_of(tmp_path, "gqa")
    units = units_of(checkpoint, "none")
    by_algorithm = {
        algorithms: choose(checkpoint, replace(preset("auto"), algorithms=algorithms), units, AutoBudget(4.9))
        for algorithms in ((), ("gptq",))
    }
    plain, mended = (found.recipe.embedding.bits for found in by_algorithm.values())
    assert mended > plain
    assert by_algorithm[("gptq",)].expected_kl < by_algorithm[()].expected_kl


def test_budgets_in_bytes_and_in_divergence(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "gqa")
    units = units_of(checkpoint, "head")
    largest = choose(checkpoint, preset("auto"), units, AutoBudget(target_bytes=1 << 30))
    assert {p.kind for p in largest.recipe.precisions} == {"int8"}
    limit = largest.expected_kl * 30
    enough = choose(checkpoint, preset("auto"), units, AutoBudget(max_kl=limit))
    assert largest.expected_kl < enough.expected_kl <= limit
    assert enough.bits_per_weight < largest.bits_per_weight
    with pytest.raises(BudgetError, match="smallest choices"):
        choose(checkpoint, preset("auto"), units, AutoBudget(target_bits=4.0))
    with pytest.raises(BudgetError, match="expected to diverge"):
        choose(checkpoint, preset("auto"), units, AutoBudget(max_kl=1e-9))


def test_widths_that_a_group_does_not_divide_keep_their_own_choices(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, "gqa")
    units = units_of(checkpoint, "head")
    units[0].divergences.pop(Precision("int4", 128))
    found = choose(checkpoint, preset("auto"), units, AutoBudget(4.5)).recipe
    assert found.embedding != Precision("int4", 128)


def _room(point: str) -> str:
    return "self_attn" if point.startswith("attention") else "mlp"
