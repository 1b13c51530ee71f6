"""The generated checkpoints are what transformers takes for a Llama, and what a published one looks like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from exporter.core.checkpoint import Checkpoint
from exporter.core.config import parse_config
from tests.benchmarks.make_checkpoint import make_checkpoint, plan_shards
from tests.benchmarks.shapes import SHAPES

TINY = [name for name in SHAPES if name.startswith("tiny-")]
# Counted from the published models' weight files.
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824}
PARAMETERS |= {"llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248}


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 1_000_000], ids=["single", "sharded"])
def test_transformers_loads_it_and_it_computes(tmp_path: Path, shape: str, shard_bytes: int) -> None:
    path = make_checkpoint(shape, tmp_path / "checkpoint", shard_bytes=shard_bytes)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard_bytes < 4_000_000_000)
    model, info = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    checkpoint = Checkpoint.open(path)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), parameter.detach().numpy())
    ids = AutoTokenizer.from_pretrained(path)("def main(): return 1", return_tensors="pt").input_ids
    assert ids.shape[1] > 3 and int(ids.max()) < model.config.vocab_size
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_weights_look_initialised_and_rows_differ(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("tiny-llama-2", tmp_path))
    matrix = checkpoint.read("model.layers.1.mlp.down_proj.weight").astype(np.float32)
    # 180,000 values of standard deviation 0.02 whose rows differ in scale by up to 2.
    assert 0.019 < matrix.std() < 0.023
    assert abs(matrix.mean()) < 2e-4
    assert len(np.unique(matrix, axis=0)) == len(matrix)
    norm = checkpoint.read("model.norm.weight").astype(np.float32)
    assert 0.9 < norm.mean() < 1.1
    assert norm.std() > 0.05


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    digests = [
        Checkpoint.open(make_checkpoint("tiny-llama-2", tmp_path / str(i), seed)).digest
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_are_the_published_ones(shape: str) -> None:
    assert parse_config(SHAPES[shape]).parameter_count == PARAMETERS[shape]


def test_shards_hold_every_tensor_in_order_within_the_limit() -> None:
    shapes = parse_config(SHAPES["llama-3.1-8b"]).tensor_shapes
    shards = plan_shards(shapes, 4_000_000_000)
    assert [name for shard in shards for name in shard] == list(shapes)
    assert all(sum(2 * int(np.prod(s)) for s in shard.values()) <= 4_000_000_000 for shard in shards)
