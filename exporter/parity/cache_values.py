"""Keys and values as an engine's KV cache stores them, for the simulation of an engine."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

INT8_TOP = 127.0
E4M3_TOP = 448.0
Scales = tuple[float, float]
"""Of a layer's keys and values, from calibration."""


def round_cached(x: torch.Tensor, kind: str, scale: float | None = None) -> torch.Tensor:
    """float32 keys (after rotation) or values [.., S, D] as a cache of `kind` gives them back, float32.

    fp16, bf16: to nearest, ties to even. int8: code = rint(x / scale), scale = max|x| / 127 of each position and head,
    zeros stay zero; with a `scale` from calibration that one, codes saturating at -128 and 127. fp8: E4M3 of x / scale,
    saturating at 448; the scale is calibrated always.
    """
    if kind == "fp16":
        return x.half().float()
    if kind == "bf16":
        return x.bfloat16().float()
    if kind == "int8" and scale is None:
        step = x.abs().amax(-1, keepdim=True) / INT8_TOP
        return torch.where(step > 0, torch.round(x / step) * step, torch.zeros_like(x))
    if kind == "int8" and scale is not None:
        return torch.round(x / scale).clamp(-INT8_TOP - 1, INT8_TOP) * scale
    if kind == "fp8" and scale is not None:
        return (x / scale).clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).float() * scale
    if kind == "fp32":
        return x
    raise ValueError(f"unknown KV cache {kind!r}" if kind != "fp8" else "a KV cache in fp8 without its scales")


class RoundedCache(DynamicCache):
    """transformers' cache, holding what an engine's cache of a kind would give back."""

    def __init__(self, kind: str, scales: Scales | None = None) -> None:
        super().__init__()
        self._kind = kind
        self._scales = scales or (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = zip((key_states, value_states), self._scales, strict=True)
        keys, values = (round_cached(x, self._kind, scale) for x, scale in states)
        updated: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *more, **options)
        return updated
