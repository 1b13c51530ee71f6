"""An engine behind HTTP with Python's own server: one process, one engine, requests one after the other.

    python serve.py ENGINE_DIR --port 8080

GET /health; POST /generate {"prompt" or "messages", "max_new_tokens", "temperature", "top_p", "seed"}, answered like
`enginesmith run --json`; POST /classify {"text"} for engines of the task classify. For more than a handful of clients
at a time put Triton in front of the engine (docs/serving.md): this server does not batch.
"""

import argparse
import json
import signal
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import enginesmith

MAX_BODY_BYTES = 1 << 20
MAX_WAITING = 16
READ_SECONDS = 30


class Refused(Exception):
    """A request that is answered with an HTTP status and a reason."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Server(ThreadingHTTPServer):
    """Holds the engine, which one request uses at a time; further ones wait, up to a number."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Any) -> None:
        super().__init__(address, Handler)
        self.engine = engine
        self.turn = threading.Lock()
        self.waiting = threading.BoundedSemaphore(MAX_WAITING)

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a POST, when it is this request's turn."""
        work = {"/generate": self.generate, "/classify": self.classify}.get(path)
        if work is None:
            raise Refused(404, "http.path", f"no such path: {path}")
        if not self.waiting.acquire(blocking=False):
            raise Refused(503, "http.busy", f"{MAX_WAITING} requests wait already")
        try:
            with self.turn:
                return work(asked)
        finally:
            self.waiting.release()

    def generate(self, asked: dict[str, Any]) -> dict[str, Any]:
        sampling = {name: take(asked, name, kind) for name, kind in SAMPLING.items() if name in asked}
        options: dict[str, Any] = {"sampling": enginesmith.Sampling(**sampling)}
        if "max_new_tokens" in asked:
            options["max_new_tokens"] = take(asked, "max_new_tokens", int)
        if "messages" in asked:
            found = self.engine.chat(take(asked, "messages", list), **options)
        else:
            found = self.engine.generate(take(asked, "prompt", str), **options)
        return dict(found.to_json())

    def classify(self, asked: dict[str, Any]) -> dict[str, Any]:
        (found,) = self.engine.classify([take(asked, "text", str)])
        return dict(found.to_json())


SAMPLING: dict[str, type] = {"temperature": float, "top_p": float, "seed": int}


def take(asked: dict[str, Any], name: str, kind: type) -> Any:
    """A field of the request in its type; a whole number will do for a float."""
    value = asked.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Refused(400, "http.field", f"{name!r} is missing or not of type {kind.__name__}")
    return value


class Handler(BaseHTTPRequestHandler):
    """HTTP in, JSON out."""

    server: Server
    timeout = READ_SECONDS
    server_version = "enginesmith"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, {"status": "ok", "digest": self.server.engine.digest})
        else:
            self.reply(404, error("http.path", f"no such path: {self.path}"))

    def do_POST(self) -> None:
        try:
            self.reply(200, self.server.answer(self.path, self.body()))
        except Refused as refused:
            self.reply(refused.status, error(refused.kind, str(refused)))
        except enginesmith.EngineSmithError as failed:
            bad_input = isinstance(failed, enginesmith.InputError | enginesmith.UnsupportedError)
            self.reply(400 if bad_input else 500, error(failed.kind, failed.message))

    def body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Refused(411, "http.length", "the request has no Content-Length")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise Refused(413, "http.length", f"the request is larger than {MAX_BODY_BYTES} bytes")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except ValueError as fault:
            raise Refused(400, "http.json", f"the request is not JSON: {fault}") from fault
        if not isinstance(value, dict):
            raise Refused(400, "http.json", "the request is not a JSON object")
        return value

    def reply(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message}}


def check(port: int) -> int:
    """0 if a server on this machine is healthy: what the container's health check runs."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return 0 if reply.status == 200 else 1
    except OSError:
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve an engine over HTTP.")
    parser.add_argument("engine", help="the directory that `enginesmith build` wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--expect-digest", help="refuse another engine than this")
    parser.add_argument("--check", action="store_true", help="ask a running server whether it is healthy")
    options = parser.parse_args()
    if options.check:
        return check(options.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        loaded = enginesmith.load(options.engine, threads=options.threads, expect_digest=options.expect_digest)
    except enginesmith.EngineSmithError as failed:
        print(f"{failed.kind}: {failed.message}. {failed.remedy}", file=sys.stderr)
        return failed.exit_code
    with loaded as engine, Server((options.host, options.port), engine) as server:
        print(f"serving {options.engine} at {options.host}:{server.server_port}", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
