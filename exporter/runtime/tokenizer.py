"""Text to token ids and back, also while tokens still arrive."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.core.errors import ArtifactError, InputError

if TYPE_CHECKING:
    import tokenizers

# No character needs more tokens than this; whatever stays undecodable longer is not UTF-8.
MAX_PENDING = 32
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer.json of an artifact. Special tokens are added as its post-processor says."""

    def __init__(self, inner: "tokenizers.Tokenizer") -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._known = frozenset(inner.get_vocab(with_added_tokens=True).values())
        self._special = frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special)

    @staticmethod
    def from_directory(path: Path) -> "Tokenizer":
        """Load `tokenizer.json`. Raises ArtifactError if this version of `tokenizers` cannot read it."""
        import tokenizers

        try:
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust library's panics derive from BaseException alone
            raise ArtifactError(
                "artifact.tokenizer",
                f"tokenizer.json cannot be read: {str(error)[:200]}",
                "install an up-to-date `tokenizers` package, or build the engine again",
            ) from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens=False` for text that a chat template wrote."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("run.prompt", f"the prompt is not Unicode text: {error}", "give UTF-8 text") from error
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens. Ids that name no token (a padded vocabulary) give nothing."""
        return str(self._inner.decode([int(i) for i in ids if i in self._known], skip_special_tokens=True))

    def is_silent(self, token: int) -> bool:
        """Whether a token never shows: special, or without a name in the vocabulary."""
        return token in self._special or token not in self._known

    def stream(self) -> "StreamDecoder":
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they arrive, holding back bytes that do not make a character yet.

    Text is decoded with the tokens before it as context, since decoders treat the first token of a text
    differently (SentencePiece drops its leading space). The pieces joined are `decode` of all ids, except
    that bytes which never become UTF-8 may be grouped differently.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        if self._tokenizer.is_silent(token):
            return ""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """What is left at the end, with U+FFFD for bytes that stayed incomplete."""
        return self._release(self._new_text()) if self._pending else ""

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._pending])[len(before) :]

    def _release(self, text: str) -> str:
        # A token that shows nothing yet (a first space) changes how the next one reads, so it stays in the context.
        self._context = self._pending if text else [*self._context, *self._pending][-MAX_PENDING:]
        self._pending = []
        return text
