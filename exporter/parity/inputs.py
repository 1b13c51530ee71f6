"""What parity is measured on: token rows cut from real text, and how each row is fed to a cache."""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError

MIN_POSITIONS = 8


@dataclass(frozen=True)
class ParityPlan:
    """How much is measured. Amounts shrink where the engine's `max_seq_len` leaves less room.

    A perplexity ratio over n positions scatters by about sqrt(2 * KL / n): `decode` is large enough that a model
    at the KL limit of its recipe is not failed by chance.
    """

    prefill: int = 256
    decode: int = 512
    single_steps: int = 32
    """Decode steps of one token each in the stages' graphs; the engine takes all `decode` steps singly."""
    ragged: tuple[int, ...] = (96, 57, 17)
    """Prompt lengths of the rows of the ragged batch."""
    ragged_steps: int = 6
    tail: int = 16
    """Last positions of the long row that are measured."""
    chunk: int = 128
    """Most tokens a row advances at once in eager and graph runs: bounds the attention scores in memory."""
    prompts: int = 24
    """Prompts of a classifier that are cut from the main row, each run by itself."""


CLASSIFIER_PLAN = ParityPlan(prefill=300, decode=148, ragged=(300, 96, 17))
"""Prompts as moderators get them, about 300 tokens; the graphs' caches are filled beyond."""


@dataclass(frozen=True)
class ParityInputs:
    """Token rows, int64. `long_row` fills a cache of `max_seq_len`; its first `prefill + decode` ids are the main row.

    `ragged[i]` holds `ragged_prompts[i]` prompt ids and then the same number of decode ids in every row.
    `classifies`: logits are those of labels, after whole prompts; the ids that follow them say nothing.
    """

    plan: ParityPlan
    prefill: int
    decode: int
    tail: int
    long_row: np.ndarray
    ragged: tuple[np.ndarray, ...]
    ragged_prompts: tuple[int, ...]
    classifies: bool = False

    @property
    def rows(self) -> list[np.ndarray]:
        """All rows: the long one first."""
        return [self.long_row, *self.ragged]

    @property
    def main_length(self) -> int:
        return self.prefill + self.decode

    @property
    def ragged_steps(self) -> int:
        return len(self.ragged[0]) - self.ragged_prompts[0]

    @property
    def main_positions(self) -> np.ndarray:
        """Positions of the main row whose logits an engine returns: its last prefilled one, then each decoded; or the
        ends of prompts that all begin with the row."""
        if self.classifies:
            shortest = max(1, self.main_length // self.plan.prompts)
            ends = np.linspace(shortest, self.main_length, self.plan.prompts)
            return np.unique(ends.astype(np.int64)) - 1
        return np.arange(self.prefill - 1, self.main_length)

    def ragged_positions(self, row: int) -> np.ndarray:
        end = self.ragged_prompts[row] if self.classifies else len(self.ragged[row])
        return np.arange(self.ragged_prompts[row] - 1, end)

    @property
    def tail_positions(self) -> np.ndarray:
        length = len(self.long_row)
        return np.arange(length - 1 if self.classifies else length - self.tail - 1, length)


def check_positions(max_seq_len: int) -> None:
    """Raise InputError (`parity.too_short`) where an engine's rows hold too little to compare."""
    if max_seq_len < MIN_POSITIONS:
        raise InputError(
            "parity.too_short",
            f"parity needs at least {MIN_POSITIONS} positions, the engine has {max_seq_len}",
            "build with a larger --max-seq-len, or with --no-parity",
        )


def parity_inputs(
    checkpoint: Path, config: ModelConfig, max_seq_len: int, text: str | None = None, plan: ParityPlan | None = None
) -> ParityInputs:
    """Rows of real text for a checkpoint directory (its `tokenizer.json`), for an engine of `max_seq_len` positions.

    The text is cycled where it is shorter than needed; every row starts elsewhere in it. Raises InputError
    (`tokenizer.missing`, `parity.text`, `parity.too_short`).
    """
    tokens, prefix = tokenize(checkpoint, text or sample_text())
    plan = plan or (CLASSIFIER_PLAN if config.classifies else ParityPlan())
    inputs = inputs_from_tokens(tokens, prefix, config.vocab_size, max_seq_len, plan)
    return replace(inputs, classifies=config.classifies)


def inputs_from_tokens(
    tokens: np.ndarray, prefix: list[int], vocab_size: int, max_seq_len: int, plan: ParityPlan
) -> ParityInputs:
    """The same from token ids; `prefix` (a BOS id) stands before every row. Ids wrap at `vocab_size`."""
    check_positions(max_seq_len)
    decode = min(plan.decode, max_seq_len // 2)
    steps = min(plan.ragged_steps, max_seq_len // 4)
    longest = max(plan.ragged)
    prompts = tuple(max(1, n * min(longest, max_seq_len - steps) // longest) for n in plan.ragged)
    lengths = [max_seq_len, *(n + steps for n in prompts)]
    stride = max(1, len(tokens) // len(lengths))
    rows = [_row(tokens, prefix, i * stride, n) % vocab_size for i, n in enumerate(lengths)]
    prefill = min(plan.prefill, max_seq_len - decode)
    tail = min(plan.tail, max_seq_len // 4)
    return ParityInputs(plan, prefill, decode, tail, rows[0], tuple(rows[1:]), prompts)


def _row(tokens: np.ndarray, prefix: list[int], start: int, length: int) -> np.ndarray:
    cycled = np.take(tokens, np.arange(start, start + length), mode="wrap")
    return np.concatenate([np.array(prefix, np.int64), cycled])[:length]


def tokenize(checkpoint: Path, text: str) -> tuple[np.ndarray, list[int]]:
    """Ids of a text, int64, and the ids that the tokenizer puts before every text (usually one BOS)."""
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            "tokenizer.missing",
            f"{checkpoint} has no tokenizer.json, so parity has no text to measure on",
            "save the tokenizer beside the weights with transformers' save_pretrained",
        )
    tokenizer = _load(file)
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    if not plain:
        raise InputError("parity.text", "the text for parity has no tokens", "give a file with some prose in it")
    whole = tokenizer.encode(text, add_special_tokens=True).ids
    added = len(whole) - len(plain)
    prefix: list[int] = next((whole[:n] for n in range(added + 1) if whole[n : n + len(plain)] == plain), [])
    return np.array(plain, np.int64), prefix


def _load(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError("tokenizer.invalid", f"{file} cannot be read: {error}", "save the tokenizer again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def sample_text() -> str:
    """The built-in sample: prose of several registers, code, numbers, and a few languages."""
    return files("exporter.parity").joinpath("sample.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of `--text FILE`; InputError when it is missing, not UTF-8 or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("parity.text", f"{path} cannot be read: {error}", "give a UTF-8 text file") from error
    if not text.strip():
        raise InputError("parity.text", f"{path} is empty", "give a file with some text in it")
    return text
