"""Chat templates: text from messages, in jinja2's sandbox inside a bounded process.

A template comes with the checkpoint, so it is treated as foreign code: jinja2's immutable sandbox keeps
it from reaching Python's insides, and a process with limits on CPU time, memory and output keeps a loop,
a huge string or a crash of the interpreter away from the caller.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporter.core.config import read_json
from exporter.core.errors import InputError

Message = Mapping[str, Any]
WORKER = Path(__file__).with_name("chat_worker.py")
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TEMPLATE_CHARS = 1 << 20


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use. Published templates need milliseconds and kilobytes.

    `wall_seconds` only guards against a process that does not run at all; CPU time is what bounds a template.
    """

    cpu_seconds: int = 4
    memory_bytes: int = 1 << 29
    output_chars: int = 1 << 23
    wall_seconds: float = 120.0


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens it may name (`bos_token` ...)."""

    source: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    limits: RenderLimits = RenderLimits()

    @staticmethod
    def from_directory(path: Path) -> "ChatTemplate":
        """The template of an artifact. Raises InputError (`chat.missing`) if the model has none."""
        file = path / "chat_template.jinja"
        if not file.is_file():
            raise InputError(
                "chat.missing",
                f"{path} has no chat template: its model was not trained for conversations, or it was left out",
                "use --prompt instead of --chat",
            )
        with file.open("rb") as stream:
            source = stream.read(4 * MAX_TEMPLATE_CHARS)
        try:
            return ChatTemplate(source.decode("utf-8"), read_special_tokens(path))
        except UnicodeDecodeError as error:
            raise _refused(f"it is not UTF-8 text ({error})") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, as transformers' `apply_chat_template` writes it without tools.

        Raises InputError: `chat.messages` (not a conversation), `chat.template` (the template fails, refuses
        the conversation, loops, or reaches outside).
        """
        context = {
            **self.special_tokens,
            "messages": _plain_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if len(self.source) > MAX_TEMPLATE_CHARS:
            raise _refused(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
        answer = _ask_worker(_request(self.source, context, self.limits), self.limits)
        if "text" not in answer:
            raise _refused(str(answer.get("error")))
        return str(answer["text"])


def read_special_tokens(path: Path) -> dict[str, Any]:
    """`bos_token`, `eos_token` ... as text, from tokenizer_config.json and special_tokens_map.json."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            merged.update(read_json(path / name, "tokenizer.file"))
    tokens: dict[str, Any] = {}
    for name in TOKEN_NAMES:
        value = merged.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _plain_messages(messages: Sequence[Message]) -> list[Any]:
    if not messages:
        raise InputError("chat.messages", "the conversation is empty", "give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(
                "chat.messages", f"not a message: {str(message)[:100]}", 'write {"role": "user", "content": "..."}'
            )
    try:
        plain: list[Any] = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("chat.messages", f"a message is not JSON: {error}", "use text, numbers and lists") from error
    return plain


def _request(source: str, context: dict[str, Any], limits: RenderLimits) -> bytes:
    paths = []
    for package in ("jinja2", "markupsafe"):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError("chat.jinja2", f"the package {package} is missing", f"pip install {package}")
        paths.append(str(Path(spec.origin).parent.parent))
    request = {
        "path": paths,
        "template": source,
        "context": context,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "output_chars": limits.output_chars,
    }
    return json.dumps(request).encode()


def _ask_worker(request: bytes, limits: RenderLimits) -> dict[str, Any]:
    """Run the worker; whatever it dies of is the template's fault."""
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    try:
        # -I -S: no environment variables, no site hooks; the worker gets the two import paths it needs.
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(WORKER)],
            input=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=limits.wall_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(f"it did not end within {limits.wall_seconds:g} seconds") from None
    except OSError as error:
        raise InputError(
            "chat.worker", f"cannot start {sys.executable!r}: {error}", "check the installation"
        ) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode or not isinstance(answer, dict):
        raise _refused(f"it needs more than {limits.cpu_seconds} s or {limits.memory_bytes >> 20} MiB, or it crashes")
    return answer


def _refused(why: str) -> InputError:
    return InputError("chat.template", f"the chat template was refused: {why}", "use --prompt, or mend the template")
