"""The tokenizer of a checkpoint, checked against its vocabulary, and the files an artifact keeps of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.core.config import ModelConfig, read_json
from exporter.core.errors import InputError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
COPIED = ("special_tokens_map.json", "generation_config.json")
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# onnxruntime-genai refuses a tokenizer_class it does not know; these, with or without "Fast", it loads.
KNOWN_CLASSES = {
    "CodeLlamaTokenizer",
    "GPT2Tokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizer",
    "Qwen2Tokenizer",
    "TokenizersBackend",
}
FALLBACK_CLASS = "TokenizersBackend"


@dataclass(frozen=True)
class TokenizerFiles:
    """File name -> bytes, as they go into an artifact; `size` is the largest token id plus one."""

    files: dict[str, bytes]
    size: int

    def write(self, directory: Path) -> None:
        """Write the files. OSError passes through (`staged_directory` names a full disk)."""
        for name, data in self.files.items():
            (directory / name).write_bytes(data)


def read_tokenizer(checkpoint: Path, config: ModelConfig) -> TokenizerFiles:
    """Read and check a checkpoint's tokenizer, chat template and generation config.

    tokenizer_config.json is adapted in one point: a `tokenizer_class` that onnxruntime-genai does not
    know becomes `TokenizersBackend`, which reads everything from tokenizer.json. Raises InputError.
    """
    data = _read_bounded(_require_tokenizer(checkpoint), MAX_TOKENIZER_BYTES, "tokenizer.file")
    size = vocabulary_size(data)
    if size > config.vocab_size:
        raise InputError(
            "tokenizer.vocabulary",
            f"the tokenizer has ids up to {size - 1}, the model's vocab_size is {config.vocab_size}",
            "the tokenizer belongs to another checkpoint, or tokens were added without resizing the model",
        )
    files = {TOKENIZER: data}
    settings = _read_optional(checkpoint / TOKENIZER_CONFIG)
    if (template := _chat_template(checkpoint, settings)) is not None:
        files[CHAT_TEMPLATE] = template.encode()
    files[TOKENIZER_CONFIG] = _dump(_adapt(settings))
    for name in COPIED:
        if (checkpoint / name).is_file():
            files[name] = _dump(read_json(checkpoint / name, "tokenizer.file"))
    return TokenizerFiles(files, size)


def tokenizer_bytes(checkpoint: Path) -> int:
    """About what an artifact keeps of it, from the sizes of the checkpoint's files; no file is read."""
    paths = (checkpoint / name for name in (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, *COPIED))
    return sum(path.stat().st_size for path in paths if path.is_file())


def vocabulary_size(data: bytes) -> int:
    """The largest id a tokenizer.json can produce, plus one. Raises InputError when it is not a tokenizer."""
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_buffer(data)
        return max(loaded.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library's panics derive from BaseException alone
        raise InputError(
            "tokenizer.file",
            f"{TOKENIZER} is not a tokenizer ({str(error)[:200]})",
            "export or download the tokenizer again, with an up-to-date `tokenizers` package",
        ) from error


def _require_tokenizer(checkpoint: Path) -> Path:
    path = checkpoint / TOKENIZER
    if path.is_file():
        return path
    old = next((name for name in SENTENCEPIECE if (checkpoint / name).is_file()), None)
    why = f"; {old} alone is not enough" if old else ""
    raise InputError(
        "tokenizer.missing",
        f"{checkpoint} has no {TOKENIZER}{why}",
        "write one: transformers.AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(CHECKPOINT)"
        if old
        else "copy the tokenizer files into the checkpoint directory",
    )


def _read_bounded(path: Path, limit: int, kind: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError(kind, f"{path.name} cannot be read: {error.strerror}", "check the file") from error
    if len(data) > limit:
        raise InputError(kind, f"{path.name} is larger than {limit} bytes", "is it the right file?")
    return data


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, "tokenizer.file") if path.is_file() else {}


def _chat_template(checkpoint: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the template of tokenizer_config.json: text, or a list with one named "default"."""
    if (checkpoint / CHAT_TEMPLATE).is_file():
        try:
            return _read_bounded(checkpoint / CHAT_TEMPLATE, MAX_TEMPLATE_BYTES, "chat.template").decode()
        except UnicodeDecodeError as error:
            raise InputError("chat.template", f"{CHAT_TEMPLATE} is not UTF-8", "export it again") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InputError("chat.template", f"chat_template in {TOKENIZER_CONFIG} is not text", "export it again")
    return template


def _adapt(settings: dict[str, Any]) -> dict[str, Any]:
    name = settings.get("tokenizer_class", FALLBACK_CLASS)
    known = isinstance(name, str) and name.removesuffix("Fast") in KNOWN_CLASSES
    return {**settings, "tokenizer_class": name if known else FALLBACK_CLASS}


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode()
