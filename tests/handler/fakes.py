"""An engine that says what a test tells it to, and TorchServe's side of the mailbox."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from tests.text.models import load, tiny_model
from tpserve.engine.errors import RequestError
from tpserve.engine.protocol import RankStatus, Ready, RequestOutput, Status
from tpserve.engine.requests import PromptEncoder
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.backend import Backend
from tpserve.handler.predictions import Defaults

MAX_SEQ_LEN = 64


class FakeEngine:
    """Keeps what was submitted; `say` plays the engine's thread."""

    def __init__(self) -> None:
        self.ready = True
        self.failure: str | None = None
        self.info = Ready(2, 100, 16, MAX_SEQ_LEN, "cpu")
        self.submitted: dict[str, tuple[list[int], SamplingParams, Callable[[RequestOutput], None]]] = {}
        self.cancelled: list[str] = []
        self.refusal: Exception | None = None

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        params.validate()
        if self.refusal is not None:
            raise self.refusal
        if request_id in self.submitted:
            raise RequestError("in use")
        self.submitted[request_id] = (prompt_token_ids, params, on_output)

    def cancel(self, request_id: str) -> None:
        if self.submitted.pop(request_id, None):
            self.cancelled.append(request_id)

    def status(self, timeout_s: float = 5.0) -> Status:
        return Status(0, [RankStatus(0, 1, 2, 0), RankStatus(1, 1, 2, 0)])

    def say(self, request_id: str, ids: list[int], finish: str | None = None, **more: Any) -> None:
        on_output = self.submitted[request_id][2]
        if finish is not None:
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
    encoder = PromptEncoder(tokenizer(), tokenizer().vocab_size, MAX_SEQ_LEN)
    return Backend(engine, tokenizer(), encoder, defaults or Defaults(), threading.Event())


def body(value: Any, content_type: str = "application/json", url_path: str = "") -> tuple[Any, dict[str, Any]]:
    """(data, headers) as TorchServe hands over a new request."""
    return {"body": value}, {"body": {"content-type": content_type}, "url_path": url_path}
