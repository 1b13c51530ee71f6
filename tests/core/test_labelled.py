"""A checkpoint seen with a head of some tokens' rows: the same bytes, the same identity, transforms and all."""

from pathlib import Path

import numpy as np
import pytest

from calibration.transformed import with_transforms
from calibration.transforms import FoldNorms, RotateHeads, RotateResidual
from exporter.core.checkpoint import EMBEDDING, HEAD, Checkpoint
from exporter.core.errors import InputError
from exporter.core.labelled import labelled, labelled_config
from exporter.core.task import GENERATE, Task
from tests.conftest import CheckpointFactory

IDS = (7, 319, 0, 45)
TASK = Task("classify", ("a", "b", "c", "d"), IDS)
ROTATED = (FoldNorms(), RotateResidual(3), RotateHeads(4))


def opened(path: Path) -> tuple[Checkpoint, Checkpoint]:
    checkpoint = Checkpoint.open(path)
    return checkpoint, labelled(checkpoint, TASK)


@pytest.mark.parametrize("shape", ["gqa", "tied", "odd_vocabulary"])
def test_the_head_has_the_rows_of_its_tokens(tiny_checkpoint: CheckpointFactory, shape: str) -> None:
    whole, view = opened(tiny_checkpoint(shape))
    wanted = whole.read(HEAD if shape != "tied" else EMBEDDING)[list(IDS)]
    found = view.read(HEAD)
    assert found.dtype == wanted.dtype and (found == wanted).all()
    assert (view.read_rows(HEAD, 1, 3) == wanted[1:3]).all()
    assert view.read_rows(HEAD, 2, 2).shape == (0, 64)
    for name in whole.tensors.keys() - {HEAD}:
        assert (view.read(name) == whole.read(name)).all()


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_names_shapes_and_identity(tiny_checkpoint: CheckpointFactory, shape: str) -> None:
    whole, view = opened(tiny_checkpoint(shape))
    assert {name: info.shape for name, info in view.tensors.items()} == view.config.tensor_shapes
    assert view.config.tensor_shapes[HEAD] == (4, 64) and view.config.head_source == HEAD
    assert (view.config.head_size, view.config.vocab_size, view.config.classifies) == (4, 320, True)
    assert (whole.config.head_size, whole.config.classifies) == (320, False)
    assert view.digest == whole.digest
    assert b"".join(view.iterate_bytes()) == b"".join(whole.iterate_bytes())


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_transforms_give_the_rows_they_give_the_whole_head(tiny_checkpoint: CheckpointFactory, shape: str) -> None:
    """Folded norms and a rotation change each row of a head by itself: not one bit differs."""
    whole, view = (with_transforms(each, ROTATED) for each in opened(tiny_checkpoint(shape)))
    assert not whole.config.tie_word_embeddings
    np.testing.assert_array_equal(view.read(HEAD), whole.read(HEAD)[list(IDS)])
    for name in (EMBEDDING, "model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        np.testing.assert_array_equal(view.read(name), whole.read(name))
    assert view.digest == whole.digest


def test_a_generator_is_the_checkpoint_itself(tiny_checkpoint: CheckpointFactory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    assert labelled(checkpoint, GENERATE) is checkpoint
    assert labelled_config(checkpoint.config, GENERATE) is checkpoint.config


def test_what_is_not_there_is_refused(tiny_checkpoint: CheckpointFactory) -> None:
    whole, view = opened(tiny_checkpoint("gqa"))
    with pytest.raises(InputError, match="'b' is token 320, the vocabulary has 320") as caught:
        labelled(whole, Task("classify", ("a", "b"), (1, 320)))
    assert caught.value.kind == "labels.token_id"
    for start, stop in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="a head of 4 labels"):
            view.read_rows(HEAD, start, stop)
