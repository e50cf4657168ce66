"""A server of the OpenAI protocol for tests: answers are a function of the request, faults are scripted, all is counted."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Call"], bool]
"""Does something else than the answer, and says True; False leaves the call alone."""


class Call:
    """One request, as the server sees it."""

    def __init__(self, handler: BaseHTTPRequestHandler, body: Any, number: int) -> None:
        self.handler, self.body, self.number = handler, body, number
        """number: 0 for the first generating request, then 1, 2, ..."""

    def send(self, status: int, content: Any, **headers: str) -> bool:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(data)))
        self.handler.end_headers()
        self.handler.wfile.write(data)
        return True

    def drop(self) -> bool:
        self.handler.close_connection = True
        self.handler.connection.shutdown(socket.SHUT_RDWR)
        return True


def text_of(body: dict[str, Any], child: int) -> str:
    """What the stub says: by prompt and seed only, as a model would."""
    asked = json.dumps([body.get("messages"), body.get("prompt"), (body.get("seed") or 0) + child])
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that arrive at once; beyond 5, some would be reset


class StubServer:
    """Use as a context: listens on 127.0.0.1, on a port of its own.

    fault: for each generating call, see Fault.  cap: the most choices it gives.  say: another text_of.
    """

    def __init__(
        self, fault: Fault | None = None, *, models: tuple[str, ...] = ("stub",), owner: str = "someone",
        cap: int | None = None, say: Callable[[dict[str, Any], int], str] = text_of, key: str | None = None,
    ) -> None:  # fmt: skip
        self.fault, self.models, self.owner, self.cap, self.say, self.key = fault, models, owner, cap, say, key
        self.asked: Counter[str] = Counter()
        """Generating requests by body, tried again or not."""
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> StubServer:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def respond(self, call: Call, path: str) -> None:
        if self.key is not None and call.handler.headers.get("Authorization") != f"Bearer {self.key}":
            call.send(401, {"error": {"message": f"wrong key {call.handler.headers.get('Authorization')}"}})
        elif path == "/v1/models":
            call.send(200, {"data": [{"id": name, "owned_by": self.owner} for name in self.models]})
        elif path in ("/v1/chat/completions", "/v1/completions"):
            self._generate(call)
        else:
            call.send(404, {"error": "no such path"})

    def _generate(self, call: Call) -> None:
        identity = json.dumps(call.body, sort_keys=True)
        with self._lock:
            call.number = sum(self.asked.values())
            self.asked[identity] += 1
            self.bodies.append(call.body)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            if self.fault is not None and self.fault(call):
                return
            count = min(call.body.get("n", 1), self.cap or 1000)
            choices = [self._choice(call.body, child) for child in range(count)]
            usage = {"prompt_tokens": 7, "completion_tokens": 3 * count}
            with self._lock:
                self.answered[identity] += 1
            call.send(200, {"choices": choices, "usage": usage})
        finally:
            with self._lock:
                self._busy -= 1

    def _choice(self, body: dict[str, Any], child: int) -> dict[str, Any]:
        text = self.say(body, child)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        return {"index": child, "finish_reason": "stop", **said}

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805  (self is the handler's)
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms

            def do_GET(self) -> None:
                stub.respond(Call(self, None, -1), self.path)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    stub.respond(Call(self, body, -1), self.path)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class Gate:
    """A fault: calls from a number on wait until `open` is set, and then go on with another; so a run is surely in the middle."""

    def __init__(self, number: int = 0, then: Fault | None = None) -> None:
        self.number, self.then, self.open = number, then, threading.Event()

    def __call__(self, call: Call) -> bool:
        if call.number >= self.number:
            self.open.wait(60)
        return self.then is not None and self.then(call)


def slow(seconds: float) -> Fault:
    """Wait, then answer."""

    def fault(call: Call) -> bool:
        time.sleep(seconds)
        return False

    return fault
