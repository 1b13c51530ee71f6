"""The labels of a classifier and the tokens that stand for them: the first that the model would generate of each."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.core.task import CLASSIFY_KIND, Task

if TYPE_CHECKING:
    import tokenizers

TOKEN_ID = re.compile(r"#(\d+)")
"""A label that is a token id."""
BY_ID = "name a token by its id: #1234"
EXAMPLE = "give at least two, with a comma between them: --labels safe,unsafe"


@dataclass(frozen=True)
class LabelToken:
    """One label: the token whose logit stands for it, as the vocabulary spells it, and how many tokens the whole label
    has."""

    label: str
    token_id: int
    token: str
    tokens: int

    def describe(self) -> str:
        """For people."""
        first = f", the first of its {self.tokens}" if self.tokens > 1 else ""
        return f"label {self.label!r}: token {self.token_id} ({self.token!r}{first})"


def label_task(checkpoint: Path, labels: Sequence[str], config: ModelConfig) -> Task:
    """The task of telling these labels apart.

    A label is a text, taken as it is spelled, spaces included, or a token id: `#1234`. Raises InputError: fewer than
    two labels, an empty one, one that is no token, two that begin with the same token, a checkpoint without a usable
    tokenizer.
    """
    _check_spelling(labels)
    found = label_tokens(tokenizer_of(checkpoint, config), labels, config.vocab_size)
    shared = defaultdict(list)
    for each in found:
        shared[each.token_id].append(each.label)
    if alike := {token: names for token, names in shared.items() if len(names) > 1}:
        what = "; ".join(f"{', '.join(map(repr, names))} with token {token}" for token, names in alike.items())
        raise InputError("labels.shared", f"labels begin with one token and cannot be told apart: {what}", BY_ID)
    return Task(CLASSIFY_KIND, tuple(labels), tuple(each.token_id for each in found))


def label_tokens(tokenizer: "tokenizers.Tokenizer", labels: Sequence[str], vocab_size: int) -> list[LabelToken]:
    """The token of each label, in their order."""
    return [_label_token(tokenizer, label, vocab_size) for label in labels]


def named_labels(checkpoint: Path, task: Task, config: ModelConfig) -> list[LabelToken]:
    """The labels of a task with their tokens' names; none where it has none."""
    if not task.classifies:
        return []
    return label_tokens(tokenizer_of(checkpoint, config), task.labels, config.vocab_size)


def tokenizer_of(checkpoint: Path, config: ModelConfig) -> "tokenizers.Tokenizer":
    """The tokenizer of a checkpoint, checked against its vocabulary."""
    import tokenizers

    return tokenizers.Tokenizer.from_buffer(read_tokenizer(checkpoint, config).files["tokenizer.json"])


def _label_token(tokenizer: "tokenizers.Tokenizer", label: str, vocab_size: int) -> LabelToken:
    if named := TOKEN_ID.fullmatch(label):
        token = int(named[1]) if len(named[1]) < 12 else vocab_size
        if token >= vocab_size:
            what = f"label {label!r}: the vocabulary has {vocab_size} tokens"
            raise InputError("labels.token_id", what, f"token ids are 0 to {vocab_size - 1}")
        return LabelToken(label, token, tokenizer.id_to_token(token) or "", 1)
    ids = tokenizer.encode(label, add_special_tokens=False).ids
    unknown = getattr(tokenizer.model, "unk_token", None)
    if not ids or (unknown is not None and ids[0] == tokenizer.token_to_id(unknown)):
        what = f"label {label!r} begins with no token of this tokenizer"
        raise InputError("labels.unknown", what, f"spell it as the model writes it, or {BY_ID}")
    return LabelToken(label, ids[0], tokenizer.id_to_token(ids[0]) or "", len(ids))


def _check_spelling(labels: Sequence[str]) -> None:
    if len(labels) < 2:
        raise InputError("labels.count", f"{len(labels)} labels: there is nothing to tell apart", EXAMPLE)
    if any(not label.strip() for label in labels):
        raise InputError("labels.empty", f"a label is empty among {list(labels)}", EXAMPLE)
    if odd := next((label for label in labels if not _is_text(label)), None):
        raise InputError("labels.text", f"the label {odd!r} is not Unicode text", "give UTF-8 text")
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError("labels.repeated", f"labels are given twice: {', '.join(repeated)}", "name each once")
    texts = [label for label in labels if not TOKEN_ID.fullmatch(label)]
    if len({label[0].isspace() for label in texts}) > 1:
        what = f"some of the labels {list(labels)} begin with a space and some do not: tokens differ by that"
        raise InputError("labels.spaces", what, "write no space after the commas, or one before every label")


def _is_text(label: str) -> bool:
    try:
        label.encode()
    except UnicodeEncodeError:
        return False
    return True
