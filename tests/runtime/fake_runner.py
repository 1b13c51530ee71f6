"""A deterministic runner in NumPy: the next token is a known function of all tokens cached in a row."""

from types import TracebackType
from typing import Self

import numpy as np

from exporter.core.errors import InputError
from targets.base import Limits, RunOptions


class FakeRunner:
    """Logits [V] are seeded by the row's tokens, so any mistake in rows, lengths or order changes the output."""

    def __init__(self, vocab_size: int, limits: Limits, options: RunOptions) -> None:
        self.vocab_size, self.limit = vocab_size, limits.max_seq_len
        self.rows: list[list[int]] = [[] for _ in range(options.batch)]
        self.hidden: list[np.ndarray] = []
        self.closed = False
        self.calls: list[str] = []

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [V] for a row that holds `tokens`."""
        return np.random.default_rng(tokens).standard_normal(self.vocab_size).astype(np.float32)

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.reset()
        self.calls[-1:] = ["prefill"]
        return self._append(input_ids, lengths)

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.calls.append("extend")
        return self._append(input_ids, lengths)

    def decode(self, input_ids: np.ndarray, active: np.ndarray) -> np.ndarray:
        self.calls.append("decode")
        return self._append(input_ids[:, None], active.astype(np.int64))

    def truncate(self, row: int, length: int) -> None:
        del self.rows[row][length:]

    def reset(self) -> None:
        self.calls.append("reset")
        self.rows = [[] for _ in self.rows]

    def _append(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        assert input_ids.dtype == np.int64 and input_ids.shape[0] == len(self.rows)
        for row, ids, length in zip(self.rows, input_ids, lengths, strict=True):
            if len(row) + length > self.limit:
                raise InputError("run.too_long", f"{len(row) + length} of {self.limit}")
            row.extend(int(token) for token in ids[: int(length)])
        return np.stack([self.logits(row) for row in self.rows])


def reference(prompt: list[int], steps: int, eos: set[int], vocab_size: int) -> list[int]:
    """Greedy tokens by the plainest loop."""
    maker = FakeRunner(vocab_size, Limits(1, 1 << 20), RunOptions())
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(np.argmax(maker.logits(tokens))))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]
