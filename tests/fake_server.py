"""An OpenAI-compatible server for tests: streams words over loopback, and misbehaves when its model's name says so.

It knows nothing of language. It counts its requests, and the most that were under way at once.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

TOKEN_SECONDS = 0.002


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers on a free port of the loopback interface."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.changed = threading.Condition()
        self.asked: list[dict[str, Any]] = []
        self.arrived_s: list[float] = []
        self.under_way = self.most_under_way = 0
        self.together = 1  # no answer before so many requests were under way at once
        self.models = ["good"]
        self.connections = 0
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server in a thread of its own."""
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer
    disable_nagle_algorithm = True
    over = True  # whether the request, if there is one, is no longer under way

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""

    def do_GET(self) -> None:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "nobody"} for name in self.server.models]
        self._reply(200, "application/json", json.dumps({"object": "list", "data": models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.changed:
            self.server.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            self.server.arrived_s.append(time.perf_counter())
            number = len(self.server.asked)
            self.server.under_way += 1
            self.over = False
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            self.server.changed.notify_all()
            self.server.changed.wait_for(lambda: self.server.most_under_way >= self.server.together, timeout=20)
        try:
            self._answer(body, number)
        finally:
            self._ends()

    def _ends(self) -> None:
        """No longer under way: said before the last byte is sent, since the client may ask anew as soon as it has that."""
        with self.server.changed:
            self.server.under_way -= not self.over
            self.over = True

    def _answer(self, body: dict[str, Any], number: int) -> None:
        mode = body["model"]
        if mode == "failing" or (mode == "flaky" and number % 2):
            self._reply(503, "application/json", b'{"error": {"message": "overloaded", "type": "server_error"}}')
        elif mode == "html":
            self._reply(200, "text/html", b"<html>a proxy's page</html>")
        elif mode == "dead":
            self.close_connection = True  # not a byte
        else:
            self._stream(mode, body)

    def _reply(self, status: int, kind: str, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    # ---------------------------------------------------------------- streams

    def _stream(self, mode: str, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = 0 if mode == "empty" else body["max_tokens"]
        self._event(self._piece(body, ""))
        for i in range(tokens):
            if mode == "hanging":
                self.server.stopped.wait(30)
            self.server.stopped.wait({"slow": 0.2}.get(mode, TOKEN_SECONDS))
            self._event(self._piece(body, f"word{i} "))
            if i == 1 and mode in ("broken", "truncated", "garbage", "error"):
                self._misbehave(mode)
                return
        self._event(self._piece(body, None, "length"))
        if mode != "silent" and body.get("stream_options", {}).get("include_usage"):
            prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            counted = {"prompt_tokens": len(prompt.split()) + 3, "completion_tokens": tokens, "total_tokens": 0}
            self._event(self._piece(body, None) | {"choices": [], "usage": counted})
        self._ends()
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _misbehave(self, mode: str) -> None:
        if mode == "broken":
            self.close_connection = True  # in the middle of the body
        elif mode == "truncated":
            self._chunk(b"")
        elif mode == "garbage":
            self._chunk(b"data: {not json\n\n")
            self._chunk(b"")
        else:
            self._event({"error": {"message": "out of memory", "type": "server_error"}})
            self._chunk(b"")

    def _piece(self, body: dict[str, Any], text: str | None, finish: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if self.path.endswith("/chat/completions"):
            choice["delta"] = {} if text is None else {"content": text}
        else:
            choice["text"] = text or ""
        return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": body["model"], "choices": [choice]}

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()
