"""The eager Hugging Face Llama as tracers see it: few layers, no weight data, all boundaries as outputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError

# Distinct sizes above one, so that no tracer takes two axes for the same or specialises on 0 or 1.
BATCH, SEQUENCE, PAST = 2, 3, 5


def llama_config(config: ModelConfig, layers: int) -> LlamaConfig:
    """The checkpoint's own config, cut to `layers` layers, eager attention.

    Weights are untied: whether head and embedding read one tensor is a matter of weights, not of structure. Token ids
    are left out: published configs hold some beyond the vocabulary, which nn.Embedding refuses as padding. Raises
    InputError for fields that only transformers reads, where they are not what it expects.
    """
    changes = {"num_hidden_layers": layers, "tie_word_embeddings": False, "pad_token_id": None}
    try:
        llama = LlamaConfig.from_dict({**config.raw, **changes})
    except Exception as error:  # its validation raises types of its own, and others where it trusts a field
        why = " ".join(str(error).split())[:300]
        raise InputError(
            "checkpoint.config",
            f"config.json: transformers refuses it: {why}",
            "correct config.json or export it again",
        ) from error
    llama._attn_implementation = "eager"
    return llama


def build_model(llama: LlamaConfig, head_size: int) -> LlamaForCausalLM:
    """An fp32 model in evaluation mode on the meta device, with a head of so many rows: shapes and types, no data."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(llama, dtype=torch.float32).eval()
        if head_size != llama.vocab_size:
            model.lm_head = torch.nn.Linear(llama.hidden_size, head_size, bias=False)
    return model


def inverse_frequencies(llama: LlamaConfig) -> np.ndarray:
    """The rotary frequencies of the eager model, computed by its own code: float32 [D / 2]."""
    frequencies: np.ndarray = LlamaRotaryEmbedding(llama).inv_freq.numpy()
    return frequencies


class _PastLayer(DynamicLayer):
    """One cache layer that starts with given keys and values; DynamicLayer alone would first join them to nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True


class LlamaWithBoundaries(torch.nn.Module):
    """Llama as a pure function of tensors.

    forward(input_ids [B, S], position_ids [B, S], mask [B, 1, S, P + S] additive, inv_freq [D / 2] (the one
    buffer whose values a graph needs, so it is not left on the meta device), then past key and value
    [B, Hkv, P, D] of each layer) -> logits [B, S, V], the embedding's output, each layer's output [B, S, H],
    then present key and value [B, Hkv, P + S, D] of each layer.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        inv_freq: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        self.model.model.rotary_emb.inv_freq = inv_freq
        layers = [_PastLayer(*past[i : i + 2]) for i in range(0, len(past), 2)]
        cache = DynamicCache()
        cache.layers = [*layers]
        with _outputs_of(self.model.model.embed_tokens, *self.model.model.layers) as boundaries:
            result = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        present = [part for layer in layers for part in (layer.keys, layer.values)]
        return (result.logits, *boundaries, *present)


@contextmanager
def _outputs_of(*modules: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that receives each module's output, in the order of execution."""
    outputs: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def example_inputs(config: ModelConfig, layers: int) -> tuple[torch.Tensor, ...]:
    """Meta tensors of the right shapes and types for `LlamaWithBoundaries`."""
    with torch.device("meta"):
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
        mask = torch.zeros(BATCH, 1, SEQUENCE, PAST + SEQUENCE)
        frequencies = torch.zeros(config.head_dim // 2)
        past = [torch.zeros(BATCH, config.num_kv_heads, PAST, config.head_dim) for _ in range(2 * layers)]
    return (ids, torch.zeros_like(ids), mask, frequencies, *past)
