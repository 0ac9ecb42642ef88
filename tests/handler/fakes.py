"""An engine that says what a test tells it to, and TorchServe's side of the mailbox."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.text.models import load, tiny_model
from tpserve.engine.errors import RequestError
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import RankStatus, RankTrace, Ready, RequestOutput, Span, Status
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.backend import Backend
from tpserve.handler.health import Probe
from tpserve.handler.open_request import Pending
from tpserve.handler.predictions import Defaults
from tpserve.handler.preparing import Prepared
from tpserve.handler.replies import Reply

MAX_SEQ_LEN = 64


class FakeEngine:
    """Keeps what was submitted; `say` plays the engine's thread."""

    def __init__(self) -> None:
        self.ready = True
        self.failure: str | None = None
        self.info = Ready(2, 100, 16, MAX_SEQ_LEN, "cpu")
        self.submitted: dict[str, tuple[list[int], SamplingParams, Callable[[RequestOutput], None]]] = {}
        self.cancelled: list[str] = []
        self.cancelled_answers: list[tuple[str, int]] = []
        self.urgency: dict[str, tuple[int, float | None]] = {}
        self.metrics = EngineMetrics()
        self.refusal: Exception | None = None

    def unhealthy_reason(self) -> str | None:
        return None if self.ready else (self.failure or "the rank group is starting")

    def submit_together(self, new: Sequence[NewRequest], *, priority: int = 0, timeout_s: float | None = None) -> None:
        for request in new:
            request.params.validate()
        if self.refusal is not None:
            raise self.refusal
        if any(request.request_id in self.submitted for request in new):
            raise RequestError("in use")
        for request_id, *asked in new:
            self.submitted[request_id] = tuple(asked)
            self.urgency[request_id] = (priority, timeout_s)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        if index is not None:
            self.cancelled_answers.append((request_id, index))
        elif self.submitted.pop(request_id, None):
            self.cancelled.append(request_id)

    def status(self, timeout_s: float = 5.0) -> Status:
        return Status(0, [RankStatus(0, 1, 2, 0), RankStatus(1, 1, 2, 0)])

    def trace(self, num_steps: int, timeout_s: float = 60.0) -> list[RankTrace]:
        return [RankTrace(0, rank, [Span(rank, "host", "schedule", 1000, num_steps)]) for rank in range(2)]

    def say(self, request_id: str, ids: list[int], finish: str | None = None, **more: Any) -> None:
        _, params, on_output = self.submitted[request_id]
        if finish is not None and params.num_choices == params.n == 1:
            del self.submitted[request_id]
        on_output(RequestOutput(request_id, ids, finish_reason=finish, **more))


class FakeContext:
    """One call's `ts.context.Context`."""

    def __init__(self, ids: list[str], headers: list[Mapping[str, Any]]) -> None:
        self.request_ids = dict(enumerate(ids))
        self.stopping_criteria: dict[int, Callable[[Any], bool | None]] | None = None
        self.model_yaml_config: Mapping[str, Any] = {}
        self.system_properties: Mapping[str, Any] = {}
        self.status: dict[int, tuple[int, str]] = {}
        self.content_type: dict[int, str] = {}
        self.headers: dict[int, dict[str, str]] = {i: {} for i in self.request_ids}
        self._request_headers = headers

    def get_all_request_header(self, idx: int) -> Mapping[str, Any]:
        return self._request_headers[idx]

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.status[idx] = (code, phrase)

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.content_type[idx] = value

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.headers[idx][key] = value


def tokenizer() -> Tokenizer:
    return load(tiny_model())


def backend(engine: FakeEngine, defaults: Defaults | None = None) -> Backend:
    return Backend(engine, tokenizer(), reader(), defaults or Defaults(), threading.Event())


def reader() -> RequestReader:
    return RequestReader(tokenizer(), tokenizer().vocab_size, MAX_SEQ_LEN)


def body(value: Any, content_type: str = "application/json", url_path: str = "") -> tuple[Any, dict[str, Any]]:
    """(data, headers) as TorchServe hands over a new request."""
    return {"body": value}, {"body": {"content-type": content_type}, "url_path": url_path}


def settled(asked: Pending | Reply, timeout_s: float = 30.0) -> Pending | Reply:
    """What a request becomes when the threads that read it, or probe the engine for it, are done."""
    deadline_s = time.monotonic() + timeout_s
    while isinstance(asked, Prepared | Probe):
        assert time.monotonic() < deadline_s
        asked = (asked.opened if isinstance(asked, Prepared) else asked.take()) or asked
        time.sleep(0.001)
    return asked
