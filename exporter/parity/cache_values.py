"""Keys and values as an engine's KV cache stores them, for the simulation of an engine."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

INT8_TOP = 127.0


def round_cached(x: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 keys (after rotation) or values [.., S, D] as a cache of `kind` gives them back, float32.

    fp16: to nearest, ties to even. int8: code = rint(x / scale), scale = max|x| / 127 of each position and head; zeros
    stay zero.
    """
    if kind == "fp16":
        return x.half().float()
    if kind == "int8":
        scale = x.abs().amax(-1, keepdim=True) / INT8_TOP
        return torch.where(scale > 0, torch.round(x / scale) * scale, torch.zeros_like(x))
    if kind == "fp32":
        return x
    raise ValueError(f"unknown KV cache {kind!r}")


class RoundedCache(DynamicCache):
    """transformers' cache, holding what an engine's cache of a kind would give back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = round_cached(key_states, self._kind), round_cached(value_states, self._kind)
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *more, **options)
        return updated
