"""A client of Triton's paths, and the engine behind it."""

from __future__ import annotations

import json
import threading
from typing import Any

from tests.handler.fakes import FakeEngine, backend, settled
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.backend import Backend
from tpserve.handler.http import HttpRequest
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply

HELLO = {"text_input": "once upon a time", "max_tokens": 5}


class Asking:
    """Asks, and keeps what the engine was given."""

    def __init__(self, served: Backend | None = None) -> None:
        self.engine = FakeEngine()
        self.backend = served or backend(self.engine)
        self.backend.engine = self.engine
        self._number = 0

    def start(self, path: str, body: Any = b"", headers: dict[str, str] | None = None, **more: Any) -> Pending | Reply:
        self._number += 1
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = HttpRequest(path, sent, "application/json", headers or {})
        return settled(self.backend.serve(f"r{self._number}", request, threading.Event(), **more))

    def open(self, path: str, body: Any, headers: dict[str, str] | None = None, **more: Any) -> Pending:
        opened = self.start(path, body, headers, **more)
        assert not isinstance(opened, Reply), opened.body
        return opened

    def now(self, path: str, body: Any = b"", headers: dict[str, str] | None = None) -> Reply:
        reply = self.start(path, body, headers)
        assert isinstance(reply, Reply)
        return reply

    def refusal(self, path: str, body: Any, headers: dict[str, str] | None = None, status: int = 400) -> str:
        """What an error says; it is Triton's form and nothing else."""
        reply = self.now(path, body, headers)
        assert reply.status == status, reply.body
        content = json.loads(reply.body)
        assert list(content) == ["error"]
        return str(content["error"])

    def prompt(self, row: int = 0) -> list[int]:
        return self.engine.submitted[f"r{self._number}/{row}"][0]

    def params(self, row: int = 0) -> SamplingParams:
        return self.engine.submitted[f"r{self._number}/{row}"][1]

    def say(self, ids: list[int], finish: str | None = None, row: int = 0, **more: Any) -> None:
        self.engine.say(f"r{self._number}/{row}", ids, finish, **more)


def taken(pending: Pending) -> Reply:
    reply = pending.take()
    assert reply is not None
    return reply


def content(pending: Pending) -> dict[str, Any]:
    reply = taken(pending)
    assert (reply.status, reply.more, reply.content_type) == (200, None, "application/json")
    found: dict[str, Any] = json.loads(reply.body)
    return found


def events(reply: Reply) -> list[dict[str, Any]]:
    assert reply.content_type == "text/event-stream"
    parts = reply.body.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part.strip() for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]
