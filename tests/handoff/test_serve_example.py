"""examples/docker/serve.py on a real engine, over HTTP."""

import importlib.util
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import enginesmith

SERVE = Path(__file__).parents[2] / "examples" / "docker" / "serve.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_example", SERVE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load_example()


@contextmanager
def running(directory: Path) -> Iterator[Any]:
    with enginesmith.load(directory, threads=1) as engine, serve.Server(("127.0.0.1", 0), engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(generator: Path) -> Iterator[Any]:
    with running(generator) as found:
        yield found


def ask(server: Any, path: str, body: object | bytes | None = None) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", data=data)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_names_the_engine(server: Any) -> None:
    assert ask(server, "/health") == (200, {"status": "ok", "digest": server.engine.digest})
    assert serve.check(server.server_port) == 0


def test_a_server_that_is_not_there_is_not_healthy() -> None:
    assert serve.check(1) == 1


def test_answers_are_the_engines(server: Any) -> None:
    code, found = ask(server, "/generate", {"prompt": "def f(x):", "max_new_tokens": 6})
    assert code == 200
    assert found == server.engine.generate("def f(x):", max_new_tokens=6).to_json()
    options = {"temperature": 1, "top_p": 0.9, "seed": 5}
    code, drawn = ask(server, "/generate", {"prompt": "a", "max_new_tokens": 4, **options})
    wanted = server.engine.generate("a", max_new_tokens=4, sampling=enginesmith.Sampling(**options))
    assert (code, drawn) == (200, wanted.to_json())


def test_labels_are_the_engines(classifier: Path) -> None:
    with running(classifier) as server:
        (wanted,) = server.engine.classify(["def f(x):"])
        assert ask(server, "/classify", {"text": "def f(x):"}) == (200, wanted.to_json())
        assert ask(server, "/generate", {"prompt": "a"})[0] == 400


def test_clients_at_once_are_answered_each(server: Any) -> None:
    wanted = server.engine.generate("b", max_new_tokens=8).to_json()
    found: list[Any] = []
    clients = [
        threading.Thread(target=lambda: found.append(ask(server, "/generate", {"prompt": "b", "max_new_tokens": 8})))
        for _ in range(6)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert found == [(200, wanted)] * 6


@pytest.mark.parametrize(
    ("path", "body", "code", "kind"),
    [
        ("/nothing", {}, 404, "http.path"),
        ("/generate", b"{", 400, "http.json"),
        ("/generate", [1], 400, "http.json"),
        ("/generate", {}, 400, "http.field"),
        ("/generate", {"prompt": 5}, 400, "http.field"),
        ("/generate", {"prompt": "a", "max_new_tokens": True}, 400, "http.field"),
        ("/generate", {"prompt": "a", "temperature": -1}, 400, "usage.temperature"),
        ("/generate", {"prompt": "a b " * 400}, 400, "run.too_long"),
        ("/generate", {"messages": [{"role": 1}]}, 400, "chat."),
        ("/classify", {"text": "a"}, 400, "run.task"),
    ],
)
def test_wrong_requests_are_told(server: Any, path: str, body: Any, code: int, kind: str) -> None:
    status, found = ask(server, path, body)
    assert status == code and found["error"]["kind"].startswith(kind)


def test_large_requests_are_refused_unread(server: Any) -> None:
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest("POST", "/generate")
    connection.putheader("Content-Length", str(serve.MAX_BODY_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_crowd_is_turned_away(server: Any) -> None:
    for _ in range(serve.MAX_WAITING):
        assert server.waiting.acquire(blocking=False)
    try:
        status, found = ask(server, "/generate", {"prompt": "a"})
    finally:
        for _ in range(serve.MAX_WAITING):
            server.waiting.release()
    assert (status, found["error"]["kind"]) == (503, "http.busy")
    assert ask(server, "/generate", {"prompt": "a", "max_new_tokens": 1})[0] == 200


def test_a_container_that_is_stopped_ends_well(generator: Path) -> None:
    command = [sys.executable, str(SERVE), str(generator), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"serving {generator} at 127.0.0.1:")
        process.terminate()
        assert process.wait() == 0


def test_an_engine_that_is_none_ends_the_process_with_its_code(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SERVE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 5 and "manifest.json" in done.stderr
