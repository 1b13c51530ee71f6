"""The eager Hugging Face model run in steps, with every boundary recorded, to compare slices with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from exporter.core.canonical import CheckpointWeight, Slice


@dataclass(frozen=True)
class EagerStep:
    """One step: `hidden` holds the embedding's output and each layer's; caches are [B, Hkv, T, D] before and after."""

    hidden: list[np.ndarray]
    past: list[tuple[np.ndarray, np.ndarray]]
    present: list[tuple[np.ndarray, np.ndarray]]
    logits: np.ndarray


def load_eager(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def run_eager(model: LlamaForCausalLM, ids: np.ndarray, past: int) -> EagerStep:
    """Run ids[:, :past] to fill the cache, then record the step with the rest."""
    cache = DynamicCache()
    recorded: list[np.ndarray] = []
    modules = [model.model.embed_tokens, *model.model.layers]
    with torch.no_grad():
        if past:
            model(torch.from_numpy(ids[:, :past]), past_key_values=cache, use_cache=True)
        before = [_caches(cache, i) if past else _empty(model, len(ids)) for i in range(len(model.model.layers))]
        hooks = [m.register_forward_hook(lambda _m, _i, out: recorded.append(out.numpy().copy())) for m in modules]
        logits = model(torch.from_numpy(ids[:, past:]), past_key_values=cache, use_cache=True).logits
    for hook in hooks:
        hook.remove()
    after = [_caches(cache, i) for i in range(len(model.model.layers))]
    return EagerStep(recorded, before, after, logits.numpy())


def _caches(cache: DynamicCache, layer: int) -> tuple[np.ndarray, np.ndarray]:
    return cache.layers[layer].keys.numpy().copy(), cache.layers[layer].values.numpy().copy()


def _empty(model: LlamaForCausalLM, batch: int) -> tuple[np.ndarray, np.ndarray]:
    config = model.config
    empty = np.zeros((batch, config.num_key_value_heads, 0, config.head_dim), np.float32)
    return empty, empty


def causal_mask(batch: int, steps: int, past: int) -> np.ndarray:
    """[B, 1, S, P + S] additive: 0 where attended, the most negative float elsewhere."""
    seen = np.arange(past + steps) <= np.arange(steps)[:, None] + past
    mask = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    return np.broadcast_to(mask, (batch, 1, steps, past + steps)).copy()


def weight_feeds(model: LlamaForCausalLM, piece: Slice) -> dict[str, np.ndarray]:
    """What feeds a slice's weights, from the eager model's own parameters."""
    state = {name: tensor.detach().numpy() for name, tensor in model.named_parameters(remove_duplicate=False)}
    return {
        name: np.concatenate([state[source] for source in weight.sources])
        if isinstance(weight, CheckpointWeight)
        else weight.values()
        for name, weight in piece.weights.items()
    }
