"""`triton_python_backend_utils` as far as our model uses it, after the README of Triton's python backend."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.handoff.model_config import parse

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError(Exception):
    INTERNAL, INVALID_ARG = 1, 3

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def outputs(self) -> dict[str, np.ndarray]:
        assert self.error is None, self.error
        return {tensor.name(): tensor.as_numpy() for tensor in self.output_tensors}

    def texts(self, name: str) -> list[str]:
        return [value.decode() for value in self.outputs()[name][:, 0]]


@dataclass
class Sender:
    """Takes what a decoupled model sends; the client leaves after `patience` responses."""

    patience: int | None = None
    sent: list[tuple[InferenceResponse | None, int]] = field(default_factory=list)

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.closed, "a response after the final one"
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        return self.patience is not None and len(self.sent) >= self.patience

    @property
    def closed(self) -> bool:
        return any(flags & FINAL for _, flags in self.sent)


@dataclass
class Request:
    tensors: dict[str, np.ndarray]
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender


def request(texts: list[str] | list[bytes], patience: int | None = None, **options: Any) -> Request:
    """Texts [B, 1] as Triton hands them over; each option for every row, in the dtype of config.pbtxt."""
    words = np.empty((len(texts), 1), np.object_)
    words[:, 0] = [text.encode() if isinstance(text, str) else text for text in texts]
    dtypes = {"max_new_tokens": np.int32, "temperature": np.float32, "top_p": np.float32, "seed": np.int64}
    given = {name: np.full((len(texts), 1), value, dtypes[name]) for name, value in options.items()}
    return Request({"text_input": words, **given}, Sender(patience))


def backend_utils() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    found = {
        "Tensor": Tensor,
        "TritonError": TritonError,
        "InferenceResponse": InferenceResponse,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "get_input_tensor_by_name": lambda asked, name: (
            Tensor(name, asked.tensors[name]) if name in asked.tensors else None
        ),
    }
    module.__dict__.update(found)
    return module


def as_json(text: str, **parameters: str) -> str:
    """config.pbtxt as Triton hands it to `initialize`, with some parameters replaced."""
    model = parse(text)
    given = {name: value.string_value for name, value in model.parameters.items()} | parameters
    return json.dumps(
        {
            "max_batch_size": model.max_batch_size,
            "parameters": {name: {"string_value": value} for name, value in given.items()},
            "model_transaction_policy": {"decoupled": model.model_transaction_policy.decoupled},
        }
    )


@contextmanager
def served(model: Path, configuration: str = "config.pbtxt", **parameters: str) -> Iterator[Any]:
    """The model of a repository, loaded as Triton loads it: version 1's model.py, then `initialize`."""
    sys.modules.setdefault("triton_python_backend_utils", backend_utils())
    try:
        namespace: dict[str, Any] = {}
        exec(compile((model / "1" / "model.py").read_text(), "model.py", "exec"), namespace)
        loaded = namespace["TritonPythonModel"]()
        settings = as_json((model / configuration).read_text(), **parameters)
        loaded.initialize({"model_config": settings, "model_repository": str(model), "model_version": "1"})
        yield loaded
        loaded.finalize()
    finally:
        sys.modules.pop("triton_python_backend_utils", None)
