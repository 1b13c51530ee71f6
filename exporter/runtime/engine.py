"""A loaded engine: `load` it, `generate`, `chat` or `classify`, leave the `with` block. Neither torch nor transformers
is used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from exporter.artifact.load import Artifact, open_artifact
from exporter.artifact.manifest import Manifest
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.machine import physical_cores
from exporter.core.task import Task
from exporter.core.threads import check_threads
from exporter.runtime.chat import ChatTemplate
from exporter.runtime.classify import Classification, classify_batch
from exporter.runtime.generate import Generation, generate_batch
from exporter.runtime.sampling import Sampling
from exporter.runtime.tokenizer import Tokenizer
from targets.base import Runner, RunOptions
from targets.registry import get_target

OnText = Callable[[str], None]
Prompt = str | Sequence[int]
DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Completion:
    """The `run` object of the contract. `text` is `output_ids` decoded, special tokens left out;
    `finish_reason` is `stop` (an end-of-sequence token, the last of `output_ids`) or `length`."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    text: str
    finish_reason: str

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_ids": list(self.prompt_ids),
            "output_ids": list(self.output_ids),
            "text": self.text,
            "finish_reason": self.finish_reason,
        }


class Engine:
    """An engine with a KV cache of `batch` rows. Close it, or use it as a context manager."""

    def __init__(self, artifact: Artifact, runner: Runner, tokenizer: Tokenizer, threads: int) -> None:
        self.artifact = artifact
        self.runner = runner
        self.tokenizer = tokenizer
        self.threads = threads

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def digest(self) -> str:
        """The artifact's identity, as `inspect` prints it."""
        return self.artifact.digest

    @property
    def batch(self) -> int:
        """Rows of the cache: how many prompts run together."""
        return len(self.runner.lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    def close(self) -> None:
        """Free the runtime and the cache."""
        self.__exit__(None, None, None)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Continue a text or a list of token ids; greedy without `sampling`.

        `on_text` receives pieces of text as they are generated; joined they are the answer. Raises
        InputError: `run.too_long`, `run.token_id`, `run.empty_prompt`.
        """
        stream = self.tokenizer.stream()

        def emit(piece: str) -> None:
            if piece and on_text is not None:
                on_text(piece)

        on_token = None if on_text is None else (lambda _, token: emit(stream.push(token)))
        (result,) = self._generate([prompt], max_new_tokens, sampling, on_token)
        emit(stream.finish())
        return result

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Continue up to `batch` prompts together; each row gives what it would give alone (up to rounding)."""
        return self._generate(prompts, max_new_tokens, sampling, None)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Answer a conversation of {"role", "content"} messages through the model's chat template.

        Raises InputError, also `chat.missing`, `chat.messages`, `chat.template`.
        """
        self._require_generator()
        ids = self._render(messages)
        return self.generate(ids, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)

    def classify(self, prompts: Sequence[Prompt]) -> list[Classification]:
        """The label of each text or list of token ids, for an engine built with `--task classify`.

        Any number of prompts; `batch` of them run together. Raises InputError: `run.too_long`, `run.token_id`,
        `run.empty_prompt`, and `run.task` on an engine that generates.
        """
        task = self._require_classifier()
        if isinstance(prompts, str):
            raise InputError("run.prompt", "classify takes a list of prompts, not one text", "give [text]")
        ids = [self.encode(prompt) for prompt in prompts]
        return classify_batch(self.runner, ids, task, max_seq_len=self.manifest.limits.max_seq_len)

    def classify_chat(self, messages: Sequence[Mapping[str, Any]]) -> Classification:
        """The label of a conversation, as the model's chat template writes it for an answer.

        Raises InputError, also `chat.missing`, `chat.messages`, `chat.template`.
        """
        self._require_classifier()
        return self.classify([self._render(messages)])[0]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; an empty text becomes the beginning-of-sequence token if the model has one."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            start = self.manifest.source.config.bos_token_id
            return ids if ids or start is None else [start]
        return [self._token(token) for token in prompt]

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation as token ids; the template writes special tokens itself."""
        text = ChatTemplate.from_directory(self.artifact.path).render(messages)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _require_classifier(self) -> Task:
        task = self.manifest.task
        if not task.classifies:
            what = "the engine generates text: it has logits for every token, and no labels"
            raise InputError("run.task", what, "use generate, or build with --task classify --labels A,B")
        return task

    def _require_generator(self) -> None:
        if (task := self.manifest.task).classifies:
            what = f"the engine tells {', '.join(map(repr, task.labels))} apart: it generates nothing"
            raise InputError("run.task", what, "use classify, or build without --task classify")

    def _token(self, token: int) -> int:
        size = self.manifest.source.config.vocab_size
        if isinstance(token, bool) or not hasattr(token, "__index__") or not 0 <= int(token) < size:
            raise InputError("run.token_id", f"{token!r} is not a token id", f"token ids are 0 to {size - 1}")
        return int(token)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None,
        on_token: Callable[[int, int], None] | None,
    ) -> list[Completion]:
        self._require_generator()
        results = generate_batch(
            self.runner,
            [self.encode(prompt) for prompt in prompts],
            max_new_tokens,
            self.manifest.source.config.eos_token_ids,
            sampling,
            on_token,
            max_seq_len=self.manifest.limits.max_seq_len,
        )
        return [self._completion(result) for result in results]

    def _completion(self, result: Generation) -> Completion:
        shown = result.output_ids[:-1] if result.finish_reason == "stop" else result.output_ids
        return Completion(result.prompt_ids, result.output_ids, self.tokenizer.decode(shown), result.finish_reason)


def load(path: str | PathLike[str], *, threads: int = 0, batch: int = 1, expect_digest: str | None = None) -> Engine:
    """Verify an artifact completely and load it, with a cache of `batch` rows.

    `threads` 0 means one per physical core. Raises InputError (no such directory, bad batch),
    ArtifactError (damaged, another digest, another host) or UnsupportedError (the runtime is missing).
    """
    check_threads(threads)
    return load_opened(open_artifact(Path(path), expect_digest), threads=threads, batch=batch)


def load_opened(artifact: Artifact, *, threads: int = 0, batch: int = 1) -> Engine:
    """`load` for an artifact whose files were checked a moment ago."""
    check_threads(threads)
    limits = artifact.manifest.limits
    if not 1 <= batch <= limits.max_batch:
        raise InputError(
            "run.batch",
            f"batch {batch}, the engine was built for up to {limits.max_batch}",
            "build with a larger --max-batch",
        )
    tokenizer = Tokenizer.from_directory(artifact.path)
    options = RunOptions(threads=threads or physical_cores(), batch=batch)
    return Engine(artifact, _open_runner(artifact, options), tokenizer, options.threads)


def _open_runner(artifact: Artifact, options: RunOptions) -> Runner:
    manifest = artifact.manifest
    target = get_target(manifest.target)
    try:
        return target.runner(artifact.path, manifest.config, manifest.limits, options).__enter__()
    except MemoryError as error:
        raise UnsupportedError(
            "run.memory",
            f"not enough memory for {manifest.weights_bytes} bytes of weights and a cache of {options.batch} rows "
            f"with {manifest.limits.max_seq_len} positions",
            "load fewer rows (batch), or build with a smaller --max-seq-len",
        ) from error
