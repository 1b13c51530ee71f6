"""Triton itself on the repositories of real engines, where there is one: ENGINESMITH_TRITONSERVER is its command.

The wheel of nvidia-pytriton 0.7 brings a tritonserver that runs without a GPU, with the python backend; it is of 24.10,
which wants NumPy below 2 in the Python that it finds, and `--backend-directory` in the command.
"""

import json
import os
import shlex
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import enginesmith

COMMAND = os.environ.get("ENGINESMITH_TRITONSERVER", "")
pytestmark = pytest.mark.skipif(not COMMAND, reason="ENGINESMITH_TRITONSERVER names no tritonserver")
PROMPTS = ["def f(x):", "return the sum of them", "a", "b", "c"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Server:
    port: int

    def post(self, path: str, body: object) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.port}/v2/models/enginesmith/{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, text: str, **options: Any) -> dict[str, Any]:
        code, body = self.post("generate", {"text_input": text, **options})
        assert code == 200, body
        found: dict[str, Any] = json.loads(body)
        return found

    def stream(self, text: str, **options: Any) -> list[dict[str, Any]]:
        code, body = self.post("generate_stream", {"text_input": text, **options})
        assert code == 200, body
        return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line]

    @property
    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready") as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


@contextmanager
def triton(engine: Path, log: Path, *options: str) -> Iterator[Server]:
    server = Server(free_port())
    address = ("--http-address=127.0.0.1", f"--http-port={server.port}", "--allow-grpc=false", "--allow-metrics=false")
    command = [*shlex.split(COMMAND), f"--model-repository={engine / 'triton'}", *address, *options]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            while not server.ready:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()


def test_requests_are_answered_as_by_the_engine_together_and_alone(generator: Path, tmp_path: Path) -> None:
    with enginesmith.load(generator, threads=1) as engine:
        wanted = {text: list(engine.generate(text, max_new_tokens=6).output_ids) for text in PROMPTS}
        drawn = engine.generate("a", max_new_tokens=6, sampling=enginesmith.Sampling(0.8, 0.9, 3))
    with triton(generator, tmp_path / "log") as server:
        found: dict[str, list[int]] = {}
        clients = [
            threading.Thread(
                target=lambda text=text: found.update({text: server.generate(text, max_new_tokens=6)["output_ids"]})
            )
            for text in PROMPTS
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert found == wanted
        sampled = server.generate("a", max_new_tokens=6, temperature=0.8, top_p=0.9, seed=3)
        assert sampled["output_ids"] == list(drawn.output_ids)
        code, body = server.post("generate", {"text_input": "a b " * 400})
        assert code == 400 and "run.too_long" in body


def test_text_is_streamed(generator: Path, tmp_path: Path) -> None:
    with enginesmith.load(generator, threads=1) as engine:
        wanted = engine.generate(PROMPTS[0], max_new_tokens=8)
    with triton(generator, tmp_path / "log", "--model-config-name=streaming") as server:
        *pieces, last = server.stream(PROMPTS[0], max_new_tokens=8)
    assert "".join(piece["text_output"] for piece in pieces) == wanted.text
    assert last["output_ids"] == list(wanted.output_ids) and last["finish_reason"] == wanted.finish_reason


def test_labels_are_told_apart(classifier: Path, tmp_path: Path) -> None:
    with enginesmith.load(classifier, threads=1) as engine:
        (wanted,) = engine.classify(PROMPTS[:1])
    with triton(classifier, tmp_path / "log") as server:
        found = server.generate(PROMPTS[0])
    assert found["label"] == wanted.label
    assert found["probabilities"] == pytest.approx(list(wanted.probabilities.values()), rel=1e-6)
