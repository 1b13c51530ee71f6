"""Triton's python backend over our runtime: `TritonPythonModel`, which the model.py of an engine hands to Triton.

Interface: triton-inference-server/python_backend README (initialize, execute, finalize; responses of a decoupled model
through a sender, the last with a flag). Requests that are alike run as one batch of the engine's rows.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.errors import EngineSmithError, InputError
from exporter.runtime.classify import Classification
from exporter.runtime.engine import Completion, Engine, load
from exporter.runtime.sampling import Sampling

CANCELLED = "the client went away"


class Cancelled(Exception):
    """The client no longer waits for a streamed answer."""


@dataclass(frozen=True)
class Prompt:
    """One row of a request: what to continue and how. Greedy rows with equal limits may run together."""

    text: str
    max_new_tokens: int
    sampling: Sampling


class TritonPythonModel:
    """One engine. `parameters` of the model's configuration: engine, digest, threads, rows, max_new_tokens."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; a failure here is shown by Triton as the reason why the model is not ready."""
        self._pb: Any = import_module("triton_python_backend_utils")
        settings = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in settings.get("parameters", {}).items()}
        model = Path(args["model_repository"])
        _remove_bytecode(model / args["model_version"])
        self._default_tokens = int(given.get("max_new_tokens", "128"))
        self._decoupled = bool(settings.get("model_transaction_policy", {}).get("decoupled", False))
        digest = given.get("digest") or None
        rows, threads = int(given.get("rows", "1")), int(given.get("threads", "0"))
        directory = (model / given.get("engine", "../..")).resolve()
        self._engine: Engine = load(directory, threads=threads, batch=rows, expect_digest=digest)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests: a list as long as theirs, or through their senders where the model is decoupled."""
        if self._engine.manifest.task.classifies:
            return self._classify_together(requests)
        if self._decoupled:
            for request in requests:
                self._stream(request)
            return None
        return self._generate_together(requests)

    def finalize(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _generate_together(self, requests: Sequence[Any]) -> list[Any]:
        """Every request's rows go into batches of alike rows; an error of a row answers its request alone."""
        asked = [self._guarded(self._prompts, request) for request in requests]
        rows = [prompt for prompts in asked if isinstance(prompts, list) for prompt in prompts]
        done = iter(self._complete(rows))
        return [
            self._answer([next(done) for _ in prompts]) if isinstance(prompts, list) else prompts for prompts in asked
        ]

    def _complete(self, rows: Sequence[Prompt]) -> list[Completion | EngineSmithError]:
        """The rows' completions or errors, in their order."""
        results: dict[int, Completion | EngineSmithError] = {}
        for batch in batches(rows, self._engine.batch):
            found = self._run([rows[index] for index in batch])
            results.update(zip(batch, found, strict=True))
        return [results[index] for index in range(len(rows))]

    def _run(self, rows: Sequence[Prompt]) -> Sequence[Completion | EngineSmithError]:
        """Alike rows at once; where that is refused, each alone, so that the one at fault is told."""
        texts, first = [row.text for row in rows], rows[0]
        try:
            return self._engine.generate_batch(texts, max_new_tokens=first.max_new_tokens, sampling=first.sampling)
        except EngineSmithError as error:
            return [error] if len(rows) == 1 else [found for row in rows for found in self._run([row])]

    def _answer(self, found: Sequence[Completion | EngineSmithError]) -> Any:
        if error := next((item for item in found if isinstance(item, EngineSmithError)), None):
            return self._failed(error)
        completions = [item for item in found if isinstance(item, Completion)]
        outputs = {
            "text_output": _texts([item.text for item in completions]),
            "output_ids": _padded([item.output_ids for item in completions]),
            "finish_reason": _texts([item.finish_reason for item in completions]),
        }
        return self._response(outputs)

    def _stream(self, request: Any) -> None:
        """Pieces of text as they come; the last response has the ids and the reason why it ended."""
        sender = request.get_response_sender()
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL

        def send(piece: str) -> None:
            if sender.is_cancelled():
                raise Cancelled
            sender.send(self._response({"text_output": _texts([piece])}))

        try:
            (prompt,) = self._prompts(request)
            found = self._engine.generate(
                prompt.text, max_new_tokens=prompt.max_new_tokens, sampling=prompt.sampling, on_text=send
            )
            ends = {"output_ids": _padded([found.output_ids]), "finish_reason": _texts([found.finish_reason])}
            sender.send(self._response({"text_output": _texts([""]), **ends}), flags=final)
        except Cancelled:
            sender.send(flags=final)
        except EngineSmithError as error:
            sender.send(self._failed(error), flags=final)
        except ValueError as error:
            sender.send(self._failed(InputError("run.batch", f"a streamed request has one row ({error})")), flags=final)

    def _classify_together(self, requests: Sequence[Any]) -> list[Any]:
        """Every request's texts at once; where that is refused, each request by itself."""
        asked = [self._guarded(self._prompt_texts, request) for request in requests]
        texts = [text for found in asked if isinstance(found, list) for text in found]
        try:
            done = iter(self._engine.classify(texts) if texts else ())
        except EngineSmithError as error:
            if len(requests) == 1:
                return [self._failed(error)]
            return [answer for request in requests for answer in self._classify_together([request])]
        return [self._labelled([next(done) for _ in found]) if isinstance(found, list) else found for found in asked]

    def _labelled(self, found: Sequence[Classification]) -> Any:
        chances = np.array([list(item.probabilities.values()) for item in found], np.float32)
        return self._response({"label": _texts([item.label for item in found]), "probabilities": chances})

    def _prompts(self, request: Any) -> list[Prompt]:
        texts = self._prompt_texts(request)
        limit = self._option(request, "max_new_tokens", self._default_tokens)
        sampling = Sampling(
            _shortest(self._option(request, "temperature", 0.0)),
            _shortest(self._option(request, "top_p", 1.0)),
            int(self._option(request, "seed", 0)),
        )
        return [Prompt(text, int(limit), sampling) for text in texts]

    def _prompt_texts(self, request: Any) -> list[str]:
        tensor = self._pb.get_input_tensor_by_name(request, "text_input")
        if tensor is None:
            raise InputError("run.prompt", "the request has no text_input", "send text")
        try:
            return [value.decode() if isinstance(value, bytes) else str(value) for value in tensor.as_numpy().ravel()]
        except UnicodeDecodeError as error:
            raise InputError("run.prompt", "text_input is not UTF-8", "send Unicode text") from error

    def _option(self, request: Any, name: str, default: Any) -> Any:
        """The one value of an optional input. Rows of a request share it."""
        tensor = self._pb.get_input_tensor_by_name(request, name)
        values = [default] if tensor is None else list(tensor.as_numpy().ravel())
        if len({repr(value) for value in values}) != 1:
            raise InputError("run.options", f"the rows of a request differ in {name}", "send them as requests apart")
        return values[0]

    def _guarded(self, work: Any, request: Any) -> Any:
        try:
            return work(request)
        except EngineSmithError as error:
            return self._failed(error)

    def _response(self, outputs: dict[str, np.ndarray]) -> Any:
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in outputs.items()])

    def _failed(self, error: EngineSmithError) -> Any:
        code = self._pb.TritonError.INVALID_ARG if isinstance(error, InputError) else self._pb.TritonError.INTERNAL
        text = f"{error.kind}: {error.message}" + (f" ({error.remedy})" if error.remedy else "")
        return self._pb.InferenceResponse(output_tensors=[], error=self._pb.TritonError(text, code))


def batches(rows: Sequence[Prompt], size: int) -> list[list[int]]:
    """Indices of rows that run together: greedy ones with one limit. A row that draws runs alone, in row 0 of the
    batch, so that its seed gives the same text whatever else is asked for."""
    groups: dict[int, list[int]] = {}
    alone = []
    for index, row in enumerate(rows):
        if row.sampling.temperature:
            alone.append([index])
        else:
            groups.setdefault(row.max_new_tokens, []).append(index)
    together = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
    return [*together, *alone]


def _remove_bytecode(version: Path) -> None:
    """Python leaves a __pycache__ beside the model.py that Triton has just imported, and the directory is part of an
    artifact, where `load` accepts no file that the manifest does not list."""
    shutil.rmtree(version / "__pycache__", ignore_errors=True)


def _shortest(value: Any) -> float:
    """A float32 as its shortest decimal: 0.8 of a request is the 0.8 of the command line."""
    return float(str(value))


def _texts(values: Sequence[str]) -> np.ndarray:
    """[B, 1] of bytes objects, which is how Triton takes strings."""
    array = np.empty((len(values), 1), np.object_)
    array[:, 0] = [value.encode() for value in values]
    return array


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [B, S]; -1 behind the shorter rows."""
    array = np.full((len(rows), max((len(row) for row in rows), default=0)), -1, np.int64)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
