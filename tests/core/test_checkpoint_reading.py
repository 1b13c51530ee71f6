"""Sound checkpoints: every tensor as the safetensors library and transformers see it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from tests.support.tiny import SHAPES, write_checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def bits(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """The storage of a tensor, for exact comparison whatever the float type."""
    if isinstance(array, torch.Tensor):
        return array.contiguous().view(torch.uint8).numpy()
    return array.view(np.uint8)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_is_what_the_library_reads(
    tiny_checkpoint: Callable[..., Path], shape: str, dtype: torch.dtype
) -> None:
    path = tiny_checkpoint(shape, dtype=dtype)
    checkpoint, reference = Checkpoint.open(path), load_file(path / "model.safetensors")
    assert checkpoint.tensors.keys() == reference.keys()
    for name, expected in reference.items():
        found = checkpoint.read(name)
        assert found.dtype.name == str(expected.dtype).removeprefix("torch.")
        assert found.shape == tuple(expected.shape)
        np.testing.assert_array_equal(bits(found), bits(expected), err_msg=name)
        np.testing.assert_array_equal(bits(checkpoint.read_rows(name, 1, 3)), bits(expected[1:3]), err_msg=name)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("sharded"), "mqa_three_layers", shard="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    model = LlamaForCausalLM.from_pretrained(sharded, dtype=torch.bfloat16)
    expected = dict(model.named_parameters())
    assert checkpoint.tensors.keys() == expected.keys()
    for name, parameter in expected.items():
        np.testing.assert_array_equal(bits(checkpoint.read(name)), bits(parameter.detach()), err_msg=name)


def test_single_file_wins_over_an_index_as_in_transformers(sharded: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(sharded, tmp_path / "both"))
    write_checkpoint(tmp_path / "single", "mqa_three_layers")
    shutil.copy(tmp_path / "single" / "model.safetensors", both)
    assert {info.path.name for info in Checkpoint.open(both).tensors.values()} == {"model.safetensors"}


def test_digest_covers_configuration_and_weights(sharded: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    state = hashlib.sha256((sharded / "config.json").read_bytes())
    for file in sorted(sharded.glob("*.safetensors")):
        state.update(file.read_bytes())
    assert checkpoint.digest == state.hexdigest()
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    assert Checkpoint.open(copy).digest == checkpoint.digest
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text())))
    assert Checkpoint.open(copy).digest != checkpoint.digest


@pytest.fixture
def tied(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Iterator[Path]:
    yield Path(shutil.copytree(tiny_checkpoint("tied"), tmp_path / "tied"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    """Change the tensors of a checkpoint and return the embedding and head that transformers then uses."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return {"embedding": model.model.embed_tokens.weight.detach(), "head": model.lm_head.weight.detach()}


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tied_checkpoint_that_holds_both_alike(tied: Path) -> None:
    used = rewrite(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    checkpoint = Checkpoint.open(tied)
    assert HEAD not in checkpoint.tensors
    np.testing.assert_array_equal(bits(checkpoint.read(checkpoint.config.head_source)), bits(used["head"]))


def test_tied_checkpoint_that_holds_only_the_head(tied: Path) -> None:
    used = rewrite(tied, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    np.testing.assert_array_equal(bits(Checkpoint.open(tied).read(EMBEDDING)), bits(used["embedding"]))


def test_tied_checkpoint_whose_matrices_differ_is_refused(tied: Path) -> None:
    # transformers then leaves them untied, with a warning: the checkpoint contradicts its configuration.
    used = rewrite(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING] * 2}))
    assert not torch.equal(used["embedding"], used["head"])
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tied)
    assert caught.value.kind == "checkpoint.tied_mismatch"


def test_saved_rotary_buffers_of_old_exporters_are_ignored(tied: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tied, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert name not in Checkpoint.open(tied).tensors


def test_opening_reads_no_weights(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> np.ndarray:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("exporter.core.checkpoint.read_rows", refuse)
    Checkpoint.open(tiny_checkpoint("gqa"))
