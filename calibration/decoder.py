"""One Llama decoder layer in float32, in the phases between its matrices, over batches of whole sequences.

The phases follow transformers' LlamaDecoderLayer (modeling_llama.py): what the parity reference runs in one go stops
here at each input of a matrix, where statistics are taken and weights may be exchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from exporter.core.config import ModelConfig

ATTENTION_MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Attended:
    """What attention gives: context [n, S, Hq * D], the input of o_proj; keys after rotation, and values, as cached:
    [n, S, Hkv * D]."""

    context: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class DecoderLayer:
    """The phases of one layer. `tensors`: its weights by relative name (`mlp.up_proj.weight`), float32."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], length: int) -> None:
        self.config = config
        self.tensors = {name: torch.from_numpy(values) for name, values in tensors.items()}
        self._cos, self._sin = _rotary_tables(config, length)

    def replace(self, name: str, values: np.ndarray) -> None:
        """Other numbers for one tensor from now on."""
        self.tensors[name] = torch.from_numpy(values)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [n, S, H] -> the input of q, k and v, same shape."""
        return self._norm(hidden, "input_layernorm.weight")

    def attend(self, x: torch.Tensor) -> Attended:
        """The input of q, k and v [n, S, H] -> causal attention over each sequence, from position 0."""
        q, k, v = (self._heads(self._linear(x, name)) for name in ATTENTION_MATRICES)
        q, k = self._rotate(q), self._rotate(k)
        grouped = self.config.num_kv_heads != self.config.num_heads
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return Attended(*(_flat(part) for part in (context, k, v)))

    def after_attention(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The residual stream after o_proj."""
        return self._linear(context, "self_attn.o_proj").add_(hidden)

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """The residual stream after attention -> the input of gate and up."""
        return self._norm(hidden, "post_attention_layernorm.weight")

    def mlp_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The input of gate and up [n, S, H] -> silu(gate) * up [n, S, I], the input of down."""
        gate = functional.silu(self._linear(x, "mlp.gate_proj"), inplace=True)
        return gate.mul_(self._linear(x, "mlp.up_proj"))

    def after_mlp(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The residual stream leaving the layer."""
        return self._linear(x, "mlp.down_proj").add_(hidden)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(hidden, self.tensors[name], self.config.rms_norm_eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[n, S, h * D] -> [n, h, S, D]."""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of [n, h, S, D] (RoFormer, arXiv:2104.09864, halves as in `rotate_half`)."""
        length = x.shape[2]
        cos, sin = self._cos[:length], self._sin[:length]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(hidden: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    """hidden / sqrt(mean(hidden^2) + epsilon) * gamma over the last axis (RMSNorm, arXiv:1910.07467, eq. 4)."""
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True).add_(epsilon))
    return (hidden * scale).mul_(gamma)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[n, h, S, D] -> [n, S, h * D]."""
    return x.transpose(1, 2).flatten(2)


def _rotary_tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, D / 2] of position * inverse frequency."""
    frequencies = torch.from_numpy(config.rope.inverse_frequencies(config.head_dim))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()
