"""The layer-by-layer reference equals LlamaForCausalLM, whole and with a cache."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from exporter.core.checkpoint import Checkpoint
from exporter.parity.metrics import relative_l2_error
from exporter.parity.reference import EagerModel
from tests.conftest import CheckpointFactory
from tests.support.tiny import SHAPES

# Both are float32 torch on equal weights; chunks change the order of sums only. Measured: at most 3e-7.
ROUNDING = 1e-6


def token_rows(vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocabulary, n) for n in (37, 90)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(shape: str, tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint(shape)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    reference = EagerModel(Checkpoint.open(path), chunk=32)
    rows = token_rows(reference.config.vocab_size)
    boundaries = list(reference.boundaries(rows))
    assert len(boundaries) == reference.config.num_layers + 1
    for i, row in enumerate(rows):
        with torch.inference_mode():
            expected = model(torch.from_numpy(row)[None], output_hidden_states=True)
        for layer, hidden in enumerate(expected.hidden_states[:-1]):
            assert relative_l2_error(hidden[0].numpy(), boundaries[layer][i]) < ROUNDING
        assert relative_l2_error(expected.logits[0].numpy(), reference.logits(boundaries[-1][i])) < ROUNDING


def test_continues_a_cached_prefix(tiny_checkpoint: CheckpointFactory) -> None:
    reference = EagerModel(Checkpoint.open(tiny_checkpoint("gqa")))
    hidden = reference.embed(token_rows(320)[:1])[0]
    layer = reference.layer(0)
    whole = layer.run(hidden)
    prefix = layer.run(hidden[:20])
    rest = layer.run(hidden[20:], past=(prefix.keys, prefix.values), chunk=1)
    assert relative_l2_error(whole.hidden[20:], rest.hidden) < ROUNDING
    assert relative_l2_error(whole.keys, rest.keys) < ROUNDING


def test_probe_sees_every_submodule(tiny_checkpoint: CheckpointFactory) -> None:
    reference = EagerModel(Checkpoint.open(tiny_checkpoint("gqa")))
    hidden = reference.embed(token_rows(320)[:1])[0]
    seen = reference.layer(1).probe(hidden)
    assert {
        f"{m}.{end}" for m in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm") for end in ("in", "out")
    } <= (seen.keys())
    assert seen["self_attn.q_proj.out"].shape == (1, len(hidden), 64)
