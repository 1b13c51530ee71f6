"""The outlier variant is the same function, and has the outliers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from exporter.core.checkpoint import Checkpoint
from tests.benchmarks.make_checkpoint import make_checkpoint
from tests.benchmarks.outlier_variant import write_variant


@pytest.mark.parametrize("shard_bytes", [4_000_000_000, 1_000_000], ids=["single", "sharded"])
def test_logits_are_those_of_the_original_and_both_loaders_take_it(tmp_path: Path, shard_bytes: int) -> None:
    original = make_checkpoint("tiny-llama-2", tmp_path / "original", shard_bytes=shard_bytes)
    variant = write_variant(original, tmp_path / "variant")
    Checkpoint.open(variant)
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 200, (2, 40)))
    with torch.no_grad():
        expected, found = (_eager(path)(ids).logits for path in (original, variant))
    # Powers of two change no rounding of any product or sum.
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_few_channels_of_each_norm_are_64_times_larger(tmp_path: Path) -> None:
    original = Checkpoint.open(make_checkpoint("tiny-llama-2", tmp_path / "original"))
    variant = Checkpoint.open(write_variant(original.path, tmp_path / "variant", channels=3))
    chosen = set()
    for name in original.tensors:
        before, after = (checkpoint.read(name).astype(np.float64) for checkpoint in (original, variant))
        if "layers" in name and "layernorm" in name:
            ratio = after / before
            assert sorted(set(ratio)) == [1.0, 64.0] and (ratio == 64).sum() == 3
            chosen.add(tuple(np.flatnonzero(ratio == 64)))
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            columns = np.abs(before).sum(0) / np.abs(after).sum(0)
            assert (columns == 64).sum() == 3 and (columns == 1).sum() == before.shape[1] - 3
        else:
            np.testing.assert_array_equal(after, before)
    assert len(chosen) > 1, "each norm has its own channels"


def test_a_factor_that_is_no_power_of_two_is_refused(tmp_path: Path) -> None:
    original = make_checkpoint("tiny-llama-2", tmp_path / "original")
    with pytest.raises(ValueError, match="power of two"):
        write_variant(original, tmp_path / "variant", factor=60.0)


def _eager(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
