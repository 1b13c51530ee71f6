"""The eager Hugging Face Llama, fp32, run one layer at a time: the reference of every parity check.

It is transformers' own code (LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaRMSNorm, eager attention, DynamicCache),
unmodified; only the order of work differs from LlamaForCausalLM: all rows pass through layer 0, its weights are
dropped, all rows pass through layer 1 ... Rows run alone and unpadded, in chunks, so that no S x S scores exist.
With `RecipeValues` the same code is the simulation of a recipe: its rounded weights, activations and cached values in
the eager model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from calibration.coverage import kernel_group
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision
from exporter.core.scattered_rows import row_ranges, rows_of
from exporter.core.weights import row_chunks
from exporter.parity.activations import round_activations
from exporter.parity.cache_values import RoundedCache, Scales
from exporter.parity.weight_values import RoundingOf, StoredValues, WeightValues, read_whole
from targets.base import ActivationRounding

CHUNK = 128


@dataclass(frozen=True)
class LayerOutput:
    """One row after one layer: hidden [S, H], and the layer's whole cache, keys and values [Hkv, P + S, D]."""

    hidden: np.ndarray
    keys: np.ndarray
    values: np.ndarray


class EagerModel:
    """The eager model of a checkpoint, holding at most one layer's weights or a few rows of the vocabulary.

    `values` says which numbers its weights have (default: the checkpoint's). `activation_rounding` says for the
    precision of a matrix how its inputs are rounded, as the recipe asks or as a target's engines do it, where it takes
    a scale from calibration, `input_scales` has it by module; `kv_cache` rounds the keys and values that attention
    sees to that storage, with `kv_scales` of each layer where they are calibrated.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        values: WeightValues | None = None,
        *,
        activation_rounding: RoundingOf | None = None,
        input_scales: Mapping[str, float] | None = None,
        kv_cache: str = "fp32",
        kv_scales: Mapping[int, Scales] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.values = values or StoredValues(checkpoint)
        self.activation_rounding = activation_rounding
        self.input_scales = input_scales or {}
        self.kv_cache = kv_cache
        self.kv_scales = kv_scales or {}
        self.chunk = chunk
        self._llama = eager_config(self.config)
        self._rotary = LlamaRotaryEmbedding(self._llama)

    @property
    def rounds_activations(self) -> bool:
        """Whether inputs of matrices are rounded."""
        return self.activation_rounding is not None

    @property
    def rounds(self) -> bool:
        """Whether values are rounded on the way: two faithful computations may then part by whole steps."""
        return self.rounds_activations or self.kv_cache != "fp32"

    def embed(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hidden states [S, H] of each row of ids [S]; reads only the embedding rows that occur."""
        ids = np.unique(np.concatenate(rows))
        name = "model.embed_tokens.weight"
        table = rows_of(ids, (self.values.read("embedding", name, *bounds) for bounds in row_ranges(ids)))
        return [table[np.searchsorted(ids, row)] for row in rows]

    def layer(self, index: int) -> "EagerLayer":
        """One decoder layer with its weights; drop it before asking for the next."""
        prefix = f"model.layers.{index}."
        shapes = {n.removeprefix(prefix): s for n, s in self.config.tensor_shapes.items() if n.startswith(prefix)}
        tensors = {name: self._tensor("layer", prefix + name, shape) for name, shape in shapes.items()}
        return self.layer_of(tensors, prefix, self.kv_scales.get(index))

    def layer_of(self, tensors: dict[str, np.ndarray], prefix: str, kv_scales: Scales | None = None) -> "EagerLayer":
        """A decoder layer from arrays by relative name (`mlp.up_proj.weight`), which it shares, not copies."""
        with torch.device("meta"):
            module = LlamaDecoderLayer(self._llama, layer_idx=0)
        state = {name: torch.from_numpy(array) for name, array in tensors.items()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False).eval()
        self._round_inputs(module, prefix)
        named = {prefix + name: array for name, array in tensors.items()}
        return EagerLayer(module, self._rotary, self.chunk, named, self.kv_cache, kv_scales)

    def boundaries(self, rows: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The residual stream [S, H] of each row of ids: entering layer 0, 1, ..., then leaving the last layer."""
        hidden = self.embed(rows)
        yield hidden
        for index in range(self.config.num_layers):
            layer = self.layer(index)
            hidden = [layer.run(row).hidden for row in hidden]
            yield hidden

    def logit_columns(self, hidden: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, logits [R, stop - start]) over the vocabulary, for hidden [R, H] leaving the last layer."""
        x = torch.from_numpy(self.normalise(hidden))
        name = self.config.head_source
        rounding = self._rounding("head", name, "lm_head")
        if rounding:
            x = rounding(x)
        for start, stop in self.column_ranges:
            weight = torch.from_numpy(self.values.read("head", name, start, stop))
            yield start, stop, (x @ weight.T).numpy()

    @property
    def column_ranges(self) -> Iterator[tuple[int, int]]:
        """The blocks of the head's columns in which logits are made."""
        return row_chunks((self.config.head_size, self.config.hidden_size))

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [R, V] at once: for few rows."""
        return np.concatenate([columns for _, _, columns in self.logit_columns(hidden)], axis=1)

    @torch.inference_mode()
    def normalise(self, hidden: np.ndarray) -> np.ndarray:
        """The final norm of hidden states [R, H]: what the head multiplies."""
        norm = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.copy_(torch.from_numpy(self._tensor("head", "model.norm.weight", (self.config.hidden_size,))))
        normed: np.ndarray = norm(torch.from_numpy(np.ascontiguousarray(hidden))).numpy()
        return normed

    def _round_inputs(self, module: torch.nn.Module, prefix: str) -> None:
        for name, child in module.named_modules():
            path = f"{prefix}{name}"
            rounding = self._rounding("layer", f"{path}.weight", path) if isinstance(child, torch.nn.Linear) else None
            if rounding:
                child.register_forward_pre_hook(rounding.hook)

    def _rounding(self, part: str, name: str, module: str) -> "_RoundInput | None":
        """What happens to the input of a matrix; None where nothing does."""
        if self.activation_rounding is None:
            return None
        precision = self.values.precision(part, name)
        how = self.activation_rounding(precision)
        return _RoundInput(precision, how, self.input_scales.get(module)) if how else None

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return read_whole(lambda start, stop: self.values.read(part, name, start, stop), shape)


@dataclass(frozen=True)
class _RoundInput:
    """Rounds the input of a matrix of a precision; `scale` where it comes from calibration."""

    precision: Precision
    how: ActivationRounding
    scale: float | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return round_activations(x, kernel_group(self.precision, x.shape[-1]), self.how, self.scale)

    def hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A forward pre-hook."""
        return (self(inputs[0]), *inputs[1:])


class EagerLayer:
    """One LlamaDecoderLayer with weights; `tensors` are those weights by checkpoint name, in the same memory."""

    def __init__(
        self,
        module: LlamaDecoderLayer,
        rotary: LlamaRotaryEmbedding,
        chunk: int,
        tensors: dict[str, np.ndarray],
        kv_cache: str = "fp32",
        kv_scales: Scales | None = None,
    ) -> None:
        self.module = module
        self.tensors = tensors
        self._rotary = rotary
        self._chunk = chunk
        self._kv_cache, self._kv_scales = kv_cache, kv_scales

    @torch.inference_mode()
    def run(
        self, hidden: np.ndarray, past: tuple[np.ndarray, np.ndarray] | None = None, chunk: int | None = None
    ) -> LayerOutput:
        """hidden [S, H] of one row, after a cached prefix (keys, values [Hkv, P, D]) if given."""
        cache = DynamicCache() if self._kv_cache == "fp32" else RoundedCache(self._kv_cache, self._kv_scales)
        start = 0
        if past is not None:
            keys, values = (torch.from_numpy(np.ascontiguousarray(part))[None] for part in past)
            cache.update(keys, values, 0)
            start = past[0].shape[1]
        out = np.empty_like(hidden)
        step = chunk or self._chunk
        for first in range(0, len(hidden), step):
            x = torch.from_numpy(np.ascontiguousarray(hidden[first : first + step]))[None]
            out[first : first + step] = self._advance(x, start + first, cache)[0].numpy()
        cached: Any = cache.layers[0]
        return LayerOutput(out, cached.keys[0].numpy(), cached.values[0].numpy())

    def _advance(self, x: torch.Tensor, start: int, cache: DynamicCache) -> torch.Tensor:
        """x [1, S, H] at positions start ...; appends to the cache."""
        positions = torch.arange(start, start + x.shape[1])
        future = torch.arange(start + x.shape[1])[None] > positions[:, None]
        mask = torch.zeros(future.shape).masked_fill_(future, torch.finfo(torch.float32).min)
        return self.module(
            x,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self._rotary(x, positions[None]),
        )

    def probe(self, hidden: np.ndarray) -> dict[str, np.ndarray]:
        """Run a row [S, H] in one go and record `module.in` and `module.out` [1, S, ..] of every submodule."""
        seen: dict[str, np.ndarray] = {}
        hooks = []
        for name, child in self.module.named_modules():
            if name and not any(child.children()):
                hooks.append(child.register_forward_hook(_Record(name, seen)))
        try:
            self.run(hidden, chunk=len(hidden))
        finally:
            for hook in hooks:
                hook.remove()
        return seen


@dataclass(frozen=True)
class _Record:
    """A forward hook that keeps a module's first input and its output."""

    name: str
    seen: dict[str, np.ndarray]

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.seen[f"{self.name}.in"] = inputs[0].numpy().copy()
        self.seen[f"{self.name}.out"] = output.numpy().copy()


def eager_config(config: ModelConfig) -> LlamaConfig:
    """The checkpoint's config for transformers, with eager attention."""
    llama = LlamaConfig.from_dict(dict(config.raw))
    llama._attn_implementation = "eager"
    return llama
