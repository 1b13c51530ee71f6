"""What runners share: rows of a KV cache that grow, are cut and forgotten, every step checked before it changes one."""

from types import TracebackType
from typing import Self

import numpy as np

from targets.base import Limits, RunOptions
from targets.run_checks import check_decode, check_options, check_step, check_truncate


class CachedRows:
    """targets.base.Runner but for the computing: a runner says how rows take in more ids (`_append`) and is closed."""

    def __init__(self, vocabulary: int, limits: Limits, options: RunOptions) -> None:
        check_options(limits, options)
        self._vocabulary, self._batch = vocabulary, options.batch
        self._limit = options.max_seq_len or limits.max_seq_len
        self.lengths = np.zeros(self._batch, np.int64)
        self.hidden: list[np.ndarray] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what the engine holds; the runner cannot be used afterwards."""
        raise NotImplementedError

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Start all rows anew: ids [B, S] right-padded, valid lengths [B] -> logits [B, V] of each last position."""
        ids, valid = self._checked(input_ids, lengths, np.zeros(self._batch, np.int64))
        self.lengths[:] = 0
        return self._append(ids, valid)

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Continue rows with [B, S] more ids, `lengths` [B] of them valid -> logits [B, V]."""
        return self._append(*self._checked(input_ids, lengths, self.lengths))

    def decode(self, input_ids: np.ndarray, active: np.ndarray) -> np.ndarray:
        """One more token [B] for each row where `active` [B] -> logits [B, V]."""
        ids, flags = check_decode(input_ids, active, self._batch)
        return self.extend(ids.reshape(-1, 1), flags.astype(np.int64))

    def truncate(self, row: int, length: int) -> None:
        """Keep only the first `length` cached positions of a row."""
        check_truncate(row, length, self.lengths)
        self.lengths[row] = length

    def reset(self) -> None:
        """Forget every row."""
        self.lengths[:] = 0

    def _append(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Take in checked ids [B, S], `valid` [B] of them -> logits [B, V]; set `lengths` and `hidden`."""
        raise NotImplementedError

    def _checked(self, input_ids: np.ndarray, lengths: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return check_step(input_ids, lengths, before, self._limit, self._vocabulary)
