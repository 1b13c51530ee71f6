"""The phases of a layer against transformers' own model: every input of a matrix, the cache, and what leaves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from calibration.decoder import DecoderLayer, rms_norm
from calibration.transforms import CONSUMERS
from exporter.core.checkpoint import Checkpoint
from tests.support.tiny import SHAPES

# float32 sums of a few hundred terms in another order; values are of the order of 1 to 10.
RELATIVE, ABSOLUTE = 1e-5, 1e-5


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=ABSOLUTE * scale)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_every_phase_equals_transformers(shape: str, tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint(shape)
    checkpoint = Checkpoint.open(path)
    eager = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    seen: dict[str, torch.Tensor] = {}
    for name, module in eager.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].clone()))
    # All 128 positions: the scaled rotary embeddings differ from plain ones there.
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (3, 128)))
    out = eager(ids, output_hidden_states=True, use_cache=True)

    prefix = "model.layers.1."
    names = [name for name in checkpoint.config.tensor_shapes if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): checkpoint.read(name).astype(np.float32) for name in names}
    layer = DecoderLayer(checkpoint.config, tensors, 128)
    hidden = out.hidden_states[1]
    x = layer.attention_input(hidden)
    attended = layer.attend(x)
    middle = layer.after_attention(hidden, attended.context)
    y = layer.mlp_input(middle)
    z = layer.mlp_hidden(y)
    leaving = layer.after_mlp(middle, z)

    found = {"attention_input": x, "attention_output": attended.context, "mlp_input": y, "mlp_hidden": z}
    for point, value in found.items():
        for module in CONSUMERS[point]:
            close(value, seen[module])
    cache = out.past_key_values.layers[1]
    close(attended.keys, cache.keys.transpose(1, 2).flatten(2))
    close(attended.values, cache.values.transpose(1, 2).flatten(2))
    if checkpoint.config.num_layers == 2:  # transformers normalises the last hidden state
        gamma = torch.from_numpy(checkpoint.read("model.norm.weight").astype(np.float32))
        leaving = rms_norm(leaving, gamma, checkpoint.config.rms_norm_eps)
    close(leaving, out.hidden_states[2])
