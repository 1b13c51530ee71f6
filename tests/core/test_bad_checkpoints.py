"""Directories that are not a sound Llama checkpoint: each refused by kind, with nothing run or written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import EngineSmithError, InputError, UnsupportedError
from tests.core.raw_safetensors import file_bytes, plant, split
from tests.support.tiny import write_checkpoint

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A private copy to damage."""
    return Path(shutil.copytree(tiny_checkpoint("gqa"), tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharded"), "gqa", shard="60KB")


@pytest.fixture
def sharded(tmp_path: Path, sharded_source: Path) -> Path:
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))


def refused(path: Path, kind: str) -> EngineSmithError:
    with pytest.raises(EngineSmithError) as caught:
        Checkpoint.open(path)
    assert caught.value.kind == f"checkpoint.{kind}"
    assert caught.value.exit_code == (3 if isinstance(caught.value, UnsupportedError) else 2)
    assert caught.value.remedy
    return caught.value


class Bomb:
    """Unpickling it creates a file, as a hostile checkpoint would run a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_and_never_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    witness = tmp_path / "exploded"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(witness)))
    assert name in refused(checkpoint, "pickled").message
    assert not witness.exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert witness.exists(), "the bomb is no bomb: this test would prove nothing"


def test_pickles_beside_safetensors_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    opened = Checkpoint.open(checkpoint)
    opened.read(NORM)
    assert opened.digest
    assert not (tmp_path / "exploded").exists()


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, "weights_missing")


def test_empty_weights_file(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    refused(checkpoint, "truncated")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a weights file, its data staying as it is."""
    header, data = split(path)
    change(header)
    path.write_bytes(file_bytes(header, data))


def test_missing_tensor(checkpoint: Path) -> None:
    header, data = split(checkpoint / "model.safetensors")
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"][0])
    first = header.pop(last)["data_offsets"][0]
    (checkpoint / "model.safetensors").write_bytes(file_bytes(header, data[:first]))
    assert last in refused(checkpoint, "tensor_missing").message


def test_extra_tensor(checkpoint: Path) -> None:
    header, data = split(checkpoint / "model.safetensors")
    extra = "model.layers.2.input_layernorm.weight"
    header[extra] = {"dtype": "BF16", "shape": [64], "data_offsets": [len(data), len(data) + 128]}
    (checkpoint / "model.safetensors").write_bytes(file_bytes(header, data + bytes(128)))
    assert extra in refused(checkpoint, "tensor_extra").message


@pytest.mark.parametrize("shape", [[32, 2], [1, 64], [64, 1]])
def test_wrong_shape(checkpoint: Path, shape: list[int]) -> None:
    edit(checkpoint / "model.safetensors", lambda header: header[NORM].update(shape=shape))
    assert NORM in refused(checkpoint, "tensor_shape").message


def test_transposed_matrix(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit(checkpoint / "model.safetensors", lambda header: header[name]["shape"].reverse())
    message = refused(checkpoint, "tensor_shape").message
    assert name in message
    assert "[128, 64]" in message


def test_config_of_another_checkpoint(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(checkpoint, "tensor_missing")
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused(checkpoint, "tensor_extra")
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))
    refused(checkpoint, "tensor_shape")


def test_tensor_of_another_type(checkpoint: Path) -> None:
    edit(checkpoint / "model.safetensors", lambda header: header[NORM].update(dtype="I16"))
    assert isinstance(refused(checkpoint, "dtype"), UnsupportedError)


OUTSIDE = ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..", "", ".safetensors/..", "model.bin"]
ODD = [7, None, ["x.safetensors"], "a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, *ODD], ids=lambda name: repr(name)[:24])
def test_index_that_names_something_else(sharded: Path, name: object) -> None:
    (sharded.parent / "model.safetensors").write_bytes(file_bytes({}, b""))
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert NORM in refused(sharded, "index").message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", '{"a": 1, "a": 1}'])
def test_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, "index")


def test_missing_shard(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    assert shards[1].name in refused(sharded, "shard_missing").message
    shards[1].mkdir()
    refused(sharded, "shard_missing")


def test_index_that_promises_more_than_a_shard_holds(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(sharded)
    assert caught.value.kind in ("checkpoint.tensor_missing", "checkpoint.tensor_extra")
    assert moved in caught.value.message


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(sharded, "truncated").message


# Exponent all ones: infinity and NaN of both signs, quiet and signalling.
NOT_FINITE = {
    "bfloat16": (0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF),
    "float16": (0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7C01, 0xFFFF),
    "float32": (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF),
}
LARGEST = {"bfloat16": (0x7F7F, 0xFF7F), "float16": (0x7BFF, 0xFBFF), "float32": (0x7F7FFFFF, 0xFF7FFFFF)}
PLANTED = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("index", [0, -1, 1000])
@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_nan_and_infinity_are_refused_where_they_are_read(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], dtype: str, index: int
) -> None:
    import torch

    path = Path(shutil.copytree(tiny_checkpoint("gqa", dtype=getattr(torch, dtype)), tmp_path / "planted"))
    for bits in NOT_FINITE[dtype]:
        plant(path / "model.safetensors", PLANTED, index, bits)
        opened = Checkpoint.open(path)
        with pytest.raises(InputError) as caught:
            opened.read(PLANTED)
        assert caught.value.kind == "checkpoint.not_finite"
        assert PLANTED in caught.value.message
        opened.read(NORM)
    for bits in LARGEST[dtype]:
        plant(path / "model.safetensors", PLANTED, index, bits)
        assert np.isfinite(Checkpoint.open(path).read(PLANTED).astype(np.float32)).all()


def test_every_bit_pattern_of_half_width_floats() -> None:
    """The integer comparison agrees with isfinite on all 65536 codes of both types."""
    import ml_dtypes

    from exporter.core.checkpoint import _all_finite

    codes = np.arange(65536, dtype=np.uint16)
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        values = codes.view(dtype)
        expected = np.isfinite(values.astype(np.float32))
        found = np.array([_all_finite(values[i : i + 1]) for i in range(65536)])
        np.testing.assert_array_equal(found, expected)
        assert _all_finite(values[expected])
        assert _all_finite(values[:0])
