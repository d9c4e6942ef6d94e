"""A loopback endpoint with chat completions, which answers as its plan says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Answers one request; gets the handler and the request's body
Behaviour = Callable[[Any, dict[str, Any]], None]


def reply(handler: Any, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    """Send a whole reply."""
    content = body.encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def say(text: str | Callable[[dict[str, Any]], str], finish_reason: str = "stop") -> Behaviour:
    """Answer with a text, or with what a function makes of the request."""

    def behave(handler: Any, body: dict[str, Any]) -> None:
        said = text if isinstance(text, str) else text(body)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": finish_reason,
        }
        completion = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
        }
        reply(handler, 200, json.dumps(completion))

    return behave


def fail(status: int, message: str = "no", **headers: str) -> Behaviour:
    """Answer with an error; `Retry_After="1"` is a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps({"error": {"message": message, "type": "t", "code": "c"}})
    return lambda handler, _: reply(handler, status, body, named)


def send(body: str) -> Behaviour:
    """Answer with any text."""
    return lambda handler, _: reply(handler, 200, body)


def keep_silent(seconds: float) -> Behaviour:
    """Answer too late."""

    def behave(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        say("late")(handler, body)

    return behave


def dribble(handler: Any, body: dict[str, Any]) -> None:
    """Begin a reply, and send a space every now and then, for two seconds."""
    handler.send_response(200)
    handler.send_header("Content-Length", "20")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def break_off(handler: Any, body: dict[str, Any]) -> None:
    """Close the connection in the middle of the reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


class Endpoint(ThreadingHTTPServer):
    """The server: behaviours of the next requests, the usual one after these, and a record."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: list[Behaviour] = []
        self.usual: Behaviour = say(lambda body: f"answer {body['seed']}")
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.num_open = self.most_open = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            server.num_open += 1
            server.most_open = max(server.most_open, server.num_open)
            behave = server.plan.pop(0) if server.plan else server.usual
        try:
            behave(self, body)
        finally:
            with server.lock:
                server.num_open -= 1

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Endpoint]:
    """Serve on this machine, inside this context."""
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
