"""Shards at work: a process for each rank, collectives between them, and the whole model's logits come out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from targets.tensorrt_llm.trtllm_reader import TrtllmCheckpoint
from tests.support.tiny import LLAMA3_ROPE, write_checkpoint
from tests.targets.tensorrt_llm.trtllm_sources import SHAPE, recipe_of, reopened, source_of, written

PROGRAM = Path(__file__).with_name("rank_process.py")
IDS = np.random.default_rng(3).integers(0, 333, (2, 24))
# float32 sums in another order, of up to 512 products, through three layers: each step 2^-24 of what it adds up.
TOLERANCE = 512 * 2.0**-24
CASES = [
    ("bf16", 2, 1),  # each head of keys on a rank of its own
    ("bf16", 4, 1),  # heads of keys repeated
    ("FP8", 2, 1),
    ("FP8", 1, 2),  # stages of two layers and one
    ("FP8_PER_CHANNEL_PER_TOKEN", 4, 1),
    ("W8A8_SQ_PER_CHANNEL", 4, 1),
    ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", 2, 1),
    ("W4A16_AWQ/64", 2, 2),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of keys, biases, a rotary embedding with scaling, an odd vocabulary."""
    shape = {**SHAPE, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    return write_checkpoint(tmp_path_factory.mktemp("llama"), rope_parameters=LLAMA3_ROPE, **shape)


def eager(checkpoint: Path, stored: TrtllmCheckpoint | None) -> np.ndarray:
    """Logits of transformers' whole model in float32, with the weights of the files where they are given."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters() if stored else ():
            parameter.copy_(torch.from_numpy(stored.rows(name, 0, len(parameter))))
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.fixture(scope="module")
def cut(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, with the logits of their ranks: each process starts once and takes part where it is needed."""
    out = tmp_path_factory.mktemp("cut")
    for name, tp, pp in CASES:
        written(source_of(checkpoint, recipe_of(name), tp, pp), out / place(name, tp, pp))
    np.save(out / "ids.npy", IDS)
    paths = [str(out / place(*case)) for case in CASES]
    running = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), out / "ids.npy", *paths], stderr=subprocess.PIPE, text=True
        )
        for rank in range(max(tp * pp for _, tp, pp in CASES))
    ]
    said = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(said)
    return out


def place(name: str, tp: int, pp: int) -> str:
    return f"{name.replace('/', '-')}-{tp}-{pp}"


@pytest.mark.parametrize("name,tp,pp", CASES)
def test_ranks_compute_the_whole_models_logits(
    checkpoint: Path, cut: Path, tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    """With the weights of a checkpoint that was not cut."""
    whole = source_of(checkpoint, recipe_of(name))
    written(whole, tmp_path / "whole")
    wanted = eager(checkpoint, None if name == "bf16" else reopened(whole, tmp_path / "whole"))
    found = np.load(cut / place(name, tp, pp) / "logits.npy")
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, atol=TOLERANCE, rtol=0)
