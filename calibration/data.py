"""Calibration data: sequences of token ids of real text, sampled with a seed.

The documents of a file (passages of a plain text, lines of JSON lines) are taken in a random order, tokenized as the
model's tokenizer does (each with the special tokens that it puts), and packed one after the other into sequences of
equal length, until there are enough.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.data_file import TextFile, scan
from exporter.core.config import ModelConfig
from exporter.core.data_summary import DataSummary as DataSummary
from exporter.core.errors import InputError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_LENGTH = 512
DEFAULT_TOKENS = 128 * DEFAULT_LENGTH
BATCH_DOCUMENTS = 16

Renderer = Callable[[Sequence[dict[str, Any]]], str]
"""Turns the messages of a chat into text, through the model's chat template."""


@dataclass(frozen=True)
class CalibrationData:
    """ids: int64 [n, S], rows of equal length without padding."""

    ids: np.ndarray
    summary: DataSummary

    @property
    def digest(self) -> str:
        """SHA-256 of the ids and their shape."""
        header = f"{self.ids.shape}".encode()
        return hashlib.sha256(header + np.ascontiguousarray(self.ids, "<i8").tobytes()).hexdigest()


def load(
    path: Path,
    checkpoint_dir: Path,
    config: ModelConfig,
    *,
    tokens: int = DEFAULT_TOKENS,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    render: Renderer | None = None,
) -> CalibrationData:
    """Sequences of `length` tokens (at most the model's positions), `tokens` in all or as many as the text gives.

    `render` writes chats; without one they are refused. Raises InputError (`data.*`, `tokenizer.*`).
    """
    if length < 2:
        raise InputError("data.tokens", f"sequences of {length} tokens", "give a --calibration-length of 2 or more")
    length = min(length, config.max_position_embeddings)
    if tokens < length:
        why = f"{tokens} calibration tokens do not fill one sequence of {length}"
        raise InputError("data.tokens", why, f"ask for at least {length}")
    file = scan(path)
    tokenizer = _load_tokenizer(checkpoint_dir)
    wanted = tokens // length * length
    ids, documents = _collect(_documents(file, tokenizer, seed, render), wanted)
    if len(ids) < length:
        why = f"{path.name} has {len(ids)} tokens, too few for one sequence of {length}"
        raise InputError("data.too_short", why, "give more text")
    _check_vocabulary(path, ids, config)
    packed = ids[: len(ids) // length * length].reshape(-1, length)
    summary = DataSummary(file.sha256, file.format, documents, packed.size, len(packed), length, seed)
    return CalibrationData(packed, summary)


def _collect(documents: Iterator[list[int]], wanted: int) -> tuple[np.ndarray, int]:
    """Ids of the documents in a row, int64 [T <= wanted], and the number of documents they come from."""
    parts, count, used = [], 0, 0
    for ids in documents:
        if count >= wanted:
            break
        parts.append(np.array(ids, np.int64))
        count, used = count + len(ids), used + 1
    return (np.concatenate(parts) if parts else np.empty(0, np.int64))[:wanted], used


def _documents(
    file: TextFile, tokenizer: "tokenizers.Tokenizer", seed: int, render: Renderer | None
) -> Iterator[list[int]]:
    """Ids of each document, in the order of the seed."""
    order = iter(np.random.default_rng(seed).permutation(len(file)).tolist())
    chat = file.format == "chat"
    while chosen := list(islice(order, BATCH_DOCUMENTS)):
        texts = [_rendered(file, index, render) if chat else str(file.read(index)) for index in chosen]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=not chat):
            yield encoding.ids


def _rendered(file: TextFile, index: int, render: Renderer | None) -> str:
    if render is None:
        why = f"{file.path.name} holds chats, but the model has no chat template"
        raise InputError("data.chat_template", why, "give plain text, or JSON lines with `text`")
    messages = file.read(index)
    assert isinstance(messages, list)
    try:
        return render(messages)
    except InputError as error:
        why = f"{file.path.name}, chat {index + 1}: {error.message}"
        raise InputError(error.kind, why, error.remedy) from error


def _load_tokenizer(checkpoint_dir: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    path = checkpoint_dir / "tokenizer.json"
    if not path.is_file():
        why = f"{checkpoint_dir} has no tokenizer.json: text cannot be tokenized"
        raise InputError("tokenizer.missing", why, "copy the tokenizer files into the checkpoint directory")
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library's panics derive from BaseException alone
        why = f"tokenizer.json is not a tokenizer ({str(error)[:200]})"
        raise InputError("tokenizer.file", why, "export or download the tokenizer again") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _check_vocabulary(path: Path, ids: np.ndarray, config: ModelConfig) -> None:
    if ids.size and int(ids.max()) >= config.vocab_size:
        why = f"{path.name} gives the token id {int(ids.max())}, the model's vocab_size is {config.vocab_size}"
        raise InputError("data.vocabulary", why, "the tokenizer belongs to another checkpoint")
