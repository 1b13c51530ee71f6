"""What a file of parameters serves as it is, per matrix, and what a target derives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.qparams import QParams
from calibration.qparams_writer import QParamsWriter
from calibration.served import Served, served
from calibration.transforms import FoldNorms
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Override, Precision, Recipe
from tests.calibration.qparams_samples import random_codes

Factory = Callable[..., Path]
INT4, INT8 = Precision("int4", 32), Precision("int8", 32)
RECIPE = Recipe("int4-gptq", INT4, INT8, INT8, algorithms=("gptq",))
UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))


def written(path: Path, checkpoint: Checkpoint, head: str, *transforms: FoldNorms) -> QParams:
    with QParamsWriter(path, source_digest=checkpoint.digest, recipe=RECIPE) as writer:
        for transform in transforms:
            writer.add_transform(transform)
        writer.add_codes(UP, random_codes(INT4))
        writer.add_codes(DOWN, random_codes(INT4, 64, 128))
        writer.add_codes(head, random_codes(INT8, 320))
        return writer.finish()


def by_tensor(found: list[Served]) -> dict[str, Served]:
    assert len({entry.tensor for entry in found}) == len(found)
    return {entry.tensor: entry for entry in found}


def test_stored_derived_and_left(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    qparams = written(tmp_path / "q", checkpoint, "lm_head.weight")
    asked = replace(
        RECIPE,
        embedding=Precision("bf16"),
        overrides=(Override("*.0.mlp.down_proj", INT8), Override("layers.1.mlp.*", Precision("nf4", 64))),
    )
    found = by_tensor(served(qparams, asked, checkpoint.config))
    assert len(found) == 2 * 7 + 2
    assert found[UP] == Served(UP, "stored", "codes int4/g32 from the file")
    assert found[DOWN].how == "derived" and "int4/g32, int8/g32 is asked" in found[DOWN].why
    assert found["lm_head.weight"].how == "stored"
    assert found["model.layers.1.mlp.up_proj.weight"].how == "derived"
    assert "nf4/g64" in found["model.layers.1.mlp.up_proj.weight"].why
    assert found["model.embed_tokens.weight"] == Served("model.embed_tokens.weight", "unquantized", "bf16 is asked")


def test_activations_asked_beside_leave_codes_stored(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    qparams = written(tmp_path / "q", checkpoint, "lm_head.weight")
    asked = replace(RECIPE, linear=replace(INT4, activations="int8/token"))
    assert by_tensor(served(qparams, asked, checkpoint.config))[UP].how == "stored"


def test_groups_that_do_not_divide(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    qparams = written(tmp_path / "q", checkpoint, "lm_head.weight")
    found = by_tensor(served(qparams, RECIPE.with_group_size(128), checkpoint.config))
    assert found[UP].how == "unquantized" and "64" in found[UP].why
    assert found[DOWN].how == "derived"


@pytest.mark.parametrize("transforms", [(), (FoldNorms(),)], ids=["tied", "untied by folding"])
def test_the_head_of_a_tied_checkpoint(
    tiny_checkpoint: Factory, tmp_path: Path, transforms: tuple[FoldNorms, ...]
) -> None:
    """Tied, head and embedding are one matrix with one set of codes; folded norms make two of them."""
    checkpoint = Checkpoint.open(tiny_checkpoint("tied"))
    head = "lm_head.weight" if transforms else "model.embed_tokens.weight"
    qparams = written(tmp_path / "q", checkpoint, head, *transforms)
    qparams.check(checkpoint)
    found = by_tensor(served(qparams, RECIPE, checkpoint.config))
    assert found["lm_head.weight"].how == "stored"
    assert found["model.embed_tokens.weight"].how == ("derived" if transforms else "stored")
