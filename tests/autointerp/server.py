"""A small local HTTP server that misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the server sends."""

    status: int
    body: str
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    sent_share: float = 1.0
    """Share of the body after which the connection is closed, though more was announced."""
    seconds_a_byte: float = 0.0
    """Time before each byte of the body."""


def completion(content: str | None, *, logprobs: Any = None, **message: Any) -> Answer:
    """A chat completion as an OpenAI-compatible server sends it; `logprobs` are those of its tokens."""
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "finish_reason": message.pop("finish_reason", "stop"),
                "message": {"role": "assistant", "content": content, **message},
                **({} if logprobs is None else {"logprobs": {"content": logprobs}}),
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }
    return Answer(200, json.dumps(body))


def error(status: int, message: str = "no") -> Answer:
    """An error as an OpenAI-compatible server sends it."""
    return Answer(status, json.dumps({"error": {"message": message, "type": "t", "code": None, "param": None}}))


class Server:
    """Its address, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        """When each request came."""
        self.released = threading.Event()
        """Set when the test is over: whoever hangs may go."""
        self.die: Callable[[], None] = lambda: None
        """Stop listening at once, as a process that is killed does."""


@contextmanager
def serving(answer: Callable[[int, dict[str, Any], Server], Answer]) -> Iterator[Server]:
    """Run a server that answers the n-th request (from 0) with what the function gives."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.times.append(time.monotonic())
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
            status, text, content_type, headers, sent_share, pause = answer(number, body, server)
            payload = text.encode()
            try:
                self.send_response_only(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(payload)))
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                sent = payload[: int(sent_share * len(payload))]
                for piece in [bytes([one]) for one in sent] if pause else [sent]:
                    server.released.wait(pause)
                    self.wfile.write(piece)
                self.close_connection = self.close_connection or sent_share < 1
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *_: Any) -> None:
            pass

    lock = threading.Lock()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    # from a thread of its own: who handles a request cannot wait for the end of the loop that handles requests
    server.die = lambda: (http.socket.close(), threading.Thread(target=http.shutdown).start())[0]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
        thread.join()
