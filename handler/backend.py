"""The engine as the handler uses it: opens requests, cancels them, and says how it is."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError, RequestError, TpserveError
from tpserve.engine.fields import shown
from tpserve.engine.metrics import CONTENT_TYPE, EngineMetrics
from tpserve.engine.protocol import RankTrace, Ready, RequestOutput, Status
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.engine.trace import chrome_trace
from tpserve.handler.open_request import Deferred, OpenRequest, Pending
from tpserve.handler.predictions import Defaults, Prediction, parse_request
from tpserve.handler.replies import Reply, error_reply, json_reply

_STATUS_TIMEOUT_S = 5.0
_TRACE_TIMEOUT_S = 60.0
_MAX_TRACE_STEPS = 10_000

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """The part of `EngineClient` that serving needs."""

    metrics: EngineMetrics

    @property
    def ready(self) -> bool: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def info(self) -> Ready: ...
    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None: ...
    def cancel(self, request_id: str, index: int | None = None) -> None: ...
    def status(self, timeout_s: float = 5.0) -> Status: ...
    def trace(self, num_steps: int, timeout_s: float = 60.0) -> list[RankTrace]: ...


class Backend:
    """Opens requests on an engine. Not thread-safe.

    Args:
        engine: started.
        tokenizer: the checkpoint's; None: replies have ids only.
        reader: of the model's fields and prompts.
        defaults: the operator's, for requests that do not say.
        signal: set whenever an open request has something new.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        reader: RequestReader,
        defaults: Defaults,
        signal: threading.Event,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._reader = reader
        self._defaults = defaults
        self.signal = signal

    def open(
        self, request_id: str, parameters: Mapping[str, Any], headers: Mapping[str, Any], stream: bool = True
    ) -> Pending | Reply:
        """Starts what a request asks for.

        Args:
            request_id: TorchServe's.
            parameters, headers: see `parse_request`.
            stream: whether streams are possible.

        Returns:
            what will have the replies, or the one reply when it is known at once. Never raises.
        """
        try:
            match str(headers.get("url_path") or "").strip("/"):
                case "":
                    prediction = parse_request(parameters, headers, self._defaults, self._reader)
                    return self._submit(request_id, prediction, stream)
                case "health":
                    return self.health()
                case "status":
                    return Deferred(self._status, self.signal)
                case "metrics":
                    return Reply(self._engine.metrics.text(), CONTENT_TYPE)
                case path if path == "trace" or path.startswith("trace/"):
                    num_steps = _trace_steps(path)
                    return Deferred(lambda: self._trace(num_steps), self.signal)
                case path:
                    known = "health, status, metrics, trace"
                    raise RequestError(f"there is nothing at {path!r}; known: {known}", status=404)
        except TpserveError as e:
            return error_reply(e)
        except Exception as e:  # whatever it is, it is this request's alone
            logger.exception("request %s", request_id)
            return error_reply(e)

    def cancel(self, pending: Pending) -> None:
        """Frees what the engine still does for `pending`."""
        for engine_id in pending.engine_ids:
            self._engine.cancel(engine_id)

    def health(self) -> Reply:
        """200 when tokens can be made, 503 with the reason when not."""
        if self._engine.ready:
            return json_reply({"status": "ready", **msgspec.structs.asdict(self._engine.info)})
        reason = self._engine.failure or "the rank group is starting"
        return json_reply({"status": "unavailable", "reason": reason}, 503)

    def _status(self) -> Reply:
        try:
            return json_reply({"ranks": self._engine.status(_STATUS_TIMEOUT_S).ranks})
        except EngineError as e:
            return error_reply(e)

    def _trace(self, num_steps: int) -> Reply:
        try:
            return json_reply(chrome_trace(self._engine.trace(num_steps, _TRACE_TIMEOUT_S)))
        except EngineError as e:
            return error_reply(e)

    def _submit(self, request_id: str, prediction: Prediction, stream: bool) -> OpenRequest:
        prompts = [self._reader.encode(prompt) for prompt in prediction.prompts]
        if not stream:
            prediction = dataclasses.replace(prediction, stream=False)
        engine_ids = tuple(f"{request_id}/{i}" for i in range(len(prompts)))
        completions = [
            Completion(
                ids,
                prediction.params,
                self._tokenizer,
                prompt.value if isinstance(prompt.value, str) else None,
                functools.partial(self._engine.cancel, engine_id),
            )
            for engine_id, ids, prompt in zip(engine_ids, prompts, prediction.prompts, strict=True)
        ]
        opened = OpenRequest(prediction, engine_ids, completions, self.signal)
        try:
            for i, (engine_id, ids) in enumerate(zip(engine_ids, prompts, strict=True)):
                self._engine.submit(
                    engine_id,
                    ids,
                    completions[i].params,
                    functools.partial(opened.deliver, i),
                    priority=prediction.priority,
                    timeout_s=prediction.timeout_s,
                )
        except TpserveError:
            self.cancel(opened)
            raise
        return opened


def _trace_steps(path: str) -> int:
    """Of `trace/100`; a query after the path does not come through TorchServe."""
    text = path.partition("/")[2] or "100"
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= _MAX_TRACE_STEPS):
        raise RequestError(f"steps must be from 1 to {_MAX_TRACE_STEPS}, got {shown(text)}", field="steps")
    return int(text)
