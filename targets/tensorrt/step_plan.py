"""Rows of any length become steps of an engine whose every row writes as many positions as the widest.

A step of width S writes S positions of every row's cache, from its own length on, whatever part of them is valid: what
is not lies behind the row's length, is seen by no valid position, and is written over later. So a step is cut where the
fullest row, resting or not, would pass the cache's end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from targets.tensorrt.engine_index import DECODE, PREFILL


@dataclass(frozen=True)
class Step:
    """One call of the engine. `ids`, `positions` int64 [B, S]; `write_indices`, `last_rows`, `valid` int64 [B];
    `ended` bool [B]: rows whose last new id is in this step, so that their logits are wanted. `column`: where the
    step starts in what the caller gave."""

    ids: np.ndarray
    positions: np.ndarray
    write_indices: np.ndarray
    last_rows: np.ndarray
    valid: np.ndarray
    ended: np.ndarray
    column: int

    @property
    def width(self) -> int:
        return int(self.ids.shape[1])

    @property
    def profile(self) -> str:
        """Which optimization profile serves it."""
        return DECODE if self.width == 1 else PREFILL

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        """The engine's inputs but for the cache."""
        return {
            "input_ids": self.ids,
            "position_ids": self.positions,
            "write_indices": self.write_indices,
            "last_rows": self.last_rows,
        }


def plan_steps(
    ids: np.ndarray, valid: np.ndarray, before: np.ndarray, cache_length: int, longest: int
) -> Iterator[Step]:
    """Steps for ids [B, S], `valid` [B] of them, of rows that hold `before` [B] positions; at most `longest` wide.

    `before + valid < cache_length` must hold: a full row still has a place to compute in while it rests.
    """
    column, lengths, total = 0, before.copy(), int(valid.max(initial=0))
    while column < total:
        width = min(total - column, longest, cache_length - int(lengths.max()))
        step = _step(ids[:, column : column + width], np.clip(valid - column, 0, width), valid, lengths, column)
        yield step
        lengths += step.valid
        column += width


def plan_whole(ids: np.ndarray, valid: np.ndarray) -> Step:
    """All of ids [B, S] at once, for an engine without a cache; an empty row computes one position nobody asks for."""
    width = int(valid.max(initial=0))
    return _step(ids[:, :width], valid, valid, np.zeros_like(valid), 0)


def _step(ids: np.ndarray, fresh: np.ndarray, valid: np.ndarray, lengths: np.ndarray, column: int) -> Step:
    """Padding, and a resting row, sit at the row's last valid position: no table is read past its end."""
    last = np.maximum(fresh - 1, 0)
    offsets = np.minimum(np.arange(ids.shape[1]), last[:, None])
    start = np.where(fresh > 0, lengths, np.maximum(lengths - 1, 0))
    return Step(
        ids=np.ascontiguousarray(ids, np.int64),
        positions=start[:, None] + offsets,
        write_indices=lengths.copy(),
        last_rows=last,
        valid=fresh,
        ended=(fresh > 0) & (valid == column + fresh),
        column=column,
    )
