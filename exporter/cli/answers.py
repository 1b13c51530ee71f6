"""What `enginesmith run` asks of an engine, and how it prints the answers."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from exporter.cli.output import Output
from exporter.core.errors import InputError

if TYPE_CHECKING:
    from exporter.runtime.engine import Engine
    from exporter.runtime.sampling import Sampling


@dataclass(frozen=True)
class Question:
    """One of `prompt` and `ids`; with `chat` a prompt is a message, and without one messages come line by line."""

    prompt: str | None
    ids: list[int] | None
    chat: bool

    def check(self, output: Output) -> None:
        """Raise InputError for what contradicts itself."""
        if (self.prompt is None) == (self.ids is None) and not (self.chat and self.ids is None):
            what = "give one of --prompt, --prompt-ids or --chat"
            raise InputError("usage.prompt", what, "see `enginesmith run --help`")
        if self.chat and (self.ids is not None or (self.prompt is None and output.json)):
            raise InputError("usage.chat", "--chat takes --prompt, or a terminal without --json", "give --prompt TEXT")

    @property
    def given(self) -> "str | list[int]":
        given = self.ids if self.ids is not None else self.prompt
        assert given is not None
        return given


@dataclass(frozen=True)
class Answering:
    """Options of generating; None: not given."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise InputError for a value that makes no sense, before an engine is loaded."""
        _ = self.sampling

    def refuse(self) -> None:
        """Raise InputError where any is given: an engine that generates nothing takes none."""
        names = [f"--{each.name.replace('_', '-')}" for each in fields(self) if getattr(self, each.name) is not None]
        if names:
            what = f"the engine tells labels apart and generates nothing: {', '.join(names)}"
            raise InputError("run.task", what, f"leave {', '.join(names)} out")

    @property
    def sampling(self) -> "Sampling":
        from exporter.runtime.sampling import Sampling

        plain = Sampling()
        return Sampling(
            plain.temperature if self.temperature is None else self.temperature,
            plain.top_p if self.top_p is None else self.top_p,
            plain.seed if self.seed is None else self.seed,
        )

    @property
    def tokens(self) -> int:
        from exporter.runtime.engine import DEFAULT_NEW_TOKENS

        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens


def generate_answer(loaded: "Engine", question: Question, answering: Answering, output: Output) -> None:
    """Continue a prompt, answer a message, or hold a conversation."""
    tokens, sampling = answering.tokens, answering.sampling
    if question.chat and question.prompt is None:
        _converse(loaded, tokens, sampling, output)
        return
    if question.chat:
        messages = [{"role": "user", "content": question.prompt}]
        answer = loaded.chat(messages, max_new_tokens=tokens, sampling=sampling, on_text=output.stream)
    else:
        answer = loaded.generate(question.given, max_new_tokens=tokens, sampling=sampling, on_text=output.stream)
    output.result(answer.to_json(), "")


def classify_answer(loaded: "Engine", question: Question, answering: Answering, output: Output) -> None:
    """The label of a prompt, of a message, or of each message on standard input."""
    answering.refuse()
    if question.chat and question.prompt is None:
        for line in _lines():
            output.stream(loaded.classify_chat([{"role": "user", "content": line}]).describe() + "\n")
        return
    if question.chat:
        found = loaded.classify_chat([{"role": "user", "content": question.prompt}])
    else:
        found = loaded.classify([question.given])[0]
    output.result(found.to_json(), found.describe())


def _converse(loaded: "Engine", tokens: int, sampling: "Sampling", output: Output) -> None:
    """One chat on standard input: a line a turn, until the end of input."""
    messages: list[dict[str, str]] = []
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = loaded.chat(messages, max_new_tokens=tokens, sampling=sampling, on_text=output.stream)
        output.stream("\n")
        messages.append({"role": "assistant", "content": answer.text})


def _lines() -> Iterator[str]:
    print("Type a message; end with Ctrl-D.", file=sys.stderr)
    for line in sys.stdin:
        yield line.rstrip("\n")
