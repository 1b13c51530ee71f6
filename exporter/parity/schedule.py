"""How rows advance through a KV cache, and the two caches that slices know: growing (raw) and static (canonical)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exporter.core.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """One call of a slice: row b gets `lengths[b]` positions from `starts[b]` on, padded to `width`. int64 [B]."""

    starts: np.ndarray
    lengths: np.ndarray
    width: int

    @staticmethod
    def single(start: int, length: int) -> "Step":
        """A step of a batch of one row."""
        return Step(np.array([start], np.int64), np.array([length], np.int64), length)

    @property
    def position_ids(self) -> np.ndarray:
        """int64 [B, width]; padding repeats the row's last valid position, so that no table is read past its end."""
        offsets = np.minimum(np.arange(self.width), self.lengths[:, None] - 1)
        return self.starts[:, None] + offsets

    def gather(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """[B, width, ..] from rows [S_b, ..]; padding repeats the last valid element, so a leak of it shows."""
        index = self.position_ids
        return np.stack([row[index[b]] for b, row in enumerate(rows)])

    def scatter(self, batch: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Write the valid part of [B, width, ..] into rows [S_b, ..]."""
        for b, row in enumerate(rows):
            start, length = self.starts[b], self.lengths[b]
            row[start : start + length] = batch[b, :length]


def chunked_steps(start: int, stop: int, chunk: int) -> list[Step]:
    """One row from `start` to `stop` in chunks."""
    return [Step.single(first, min(chunk, stop - first)) for first in range(start, stop, chunk)]


def main_steps(prefill: int, decode: int, singles: int, chunk: int) -> list[Step]:
    """The main row: prefill in at least two chunks, `singles` decode steps of one token, the rest in chunks."""
    step = min(chunk, max(1, -(-prefill // 2)))
    total, singles = prefill + decode, min(singles, decode)
    single_steps = chunked_steps(prefill, prefill + singles, 1)
    return [*chunked_steps(0, prefill, step), *single_steps, *chunked_steps(prefill + singles, total, chunk)]


def ragged_steps(prompts: Sequence[int], steps: int) -> list[Step]:
    """A right-padded batch of prompts of different lengths, then `steps` decode steps of all rows."""
    lengths = np.array(prompts, np.int64)
    first = Step(np.zeros_like(lengths), lengths, int(lengths.max()))
    return [first, *(Step(lengths + i, np.ones_like(lengths), 1) for i in range(steps))]


class SliceCache(Protocol):
    """Keys and values of a batch between the calls of one layer slice."""

    def feeds(self, step: Step) -> dict[str, np.ndarray]:
        """The layer's inputs besides `hidden` and weights."""
        ...

    def store(self, outputs: dict[str, np.ndarray], step: Step) -> None: ...

    def held(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `length` valid keys and values of a row, [Hkv, length, D]."""
        ...


class GrowingCache:
    """For raw layers: the past grows by the padded width of each step; an additive mask hides what is not to see."""

    def __init__(self, config: ModelConfig, batch: int) -> None:
        empty = np.zeros((batch, config.num_kv_heads, 0, config.head_dim), np.float32)
        self.key, self.value = empty, empty
        self.valid = np.zeros((batch, 0), bool)

    @staticmethod
    def filled(key: np.ndarray, value: np.ndarray) -> "GrowingCache":
        """One row that already holds [Hkv, P, D]."""
        cache = GrowingCache.__new__(GrowingCache)
        cache.key, cache.value = key[None], value[None]
        cache.valid = np.ones((1, key.shape[1]), bool)
        return cache

    def feeds(self, step: Step) -> dict[str, np.ndarray]:
        batch, width = len(step.starts), step.width
        causal = np.tri(width, dtype=bool)[None] & (np.arange(width) < step.lengths[:, None])[:, None]
        past = np.broadcast_to(self.valid[:, None], (batch, width, self.valid.shape[1]))
        visible = np.concatenate([past, causal], axis=2)
        mask = np.where(visible, np.float32(0), np.finfo(np.float32).min)[:, None]
        return {
            "position_ids": step.position_ids,
            "attention_mask": mask,
            "past_key": self.key,
            "past_value": self.value,
        }

    def store(self, outputs: dict[str, np.ndarray], step: Step) -> None:
        self.key, self.value = outputs["present_key"], outputs["present_value"]
        new = np.arange(step.width) < step.lengths[:, None]
        self.valid = np.concatenate([self.valid, new], axis=1)

    def held(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        valid = self.valid[row]
        return self.key[row][:, valid][:, :length], self.value[row][:, valid][:, :length]


class StaticCache:
    """For canonical layers: a buffer of fixed length; each step is written at the row's own position."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.key, self.value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    @staticmethod
    def filled(key: np.ndarray, value: np.ndarray, capacity: int) -> "StaticCache":
        """One row whose first positions hold [Hkv, P, D]."""
        cache = StaticCache.__new__(StaticCache)
        shape = (1, key.shape[0], capacity, key.shape[2])
        cache.key, cache.value = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        cache.key[0, :, : key.shape[1]], cache.value[0, :, : key.shape[1]] = key, value
        return cache

    def feeds(self, step: Step) -> dict[str, np.ndarray]:
        return {
            "position_ids": step.position_ids,
            "write_indices": step.starts,
            "nonpad_kv_seqlen": step.starts + step.width,
            "past_key": self.key,
            "past_value": self.value,
        }

    def store(self, outputs: dict[str, np.ndarray], step: Step) -> None:
        self.key, self.value = outputs["present_key"], outputs["present_value"]

    def held(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.key[row][:, :length], self.value[row][:, :length]
