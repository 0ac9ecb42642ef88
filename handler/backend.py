"""The engine as the handler uses it: opens requests, cancels them, and says how it is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError, OverloadedError, RequestError, TpserveError
from tpserve.engine.fields import shown
from tpserve.engine.grammar_check import GrammarChecker, UnknownGrammarError
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.metrics import CONTENT_TYPE, EngineMetrics
from tpserve.engine.protocol import RankTrace, Ready, Status
from tpserve.engine.requests import Prompt, RequestReader
from tpserve.engine.text.chat_template import ChatTemplate, default_template
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.engine.trace import chrome_trace
from tpserve.handler.health import Health
from tpserve.handler.http import MAX_HEADERS, HttpRequest, Signal
from tpserve.handler.open_request import Deferred, Input, OpenAnswers, OpenRequest, Pending
from tpserve.handler.predictions import Defaults, Prediction, parse_request
from tpserve.handler.preparing import Prepared, Preparer
from tpserve.handler.refusals import Refusal, refusal_reply
from tpserve.handler.replies import Reply, error_reply, json_reply
from tpserve.handler.routes import ENDPOINTS, find_endpoint
from tpserve.handler.torchserve import read_request
from tpserve.handler.tracing import RequestTracer

_STATUS_TIMEOUT_S = 5.0
_TRACE_TIMEOUT_S = 60.0
_MAX_TRACE_STEPS = 10_000
_LARGE_BYTES = 64 << 10  # a body that takes longer to read than a step should wait

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=OpenAnswers)


class Engine(Protocol):
    """The part of `EngineClient` that serving needs."""

    metrics: EngineMetrics

    @property
    def ready(self) -> bool: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def info(self) -> Ready: ...
    def unhealthy_reason(self) -> str | None: ...
    def submit_together(
        self, new: Sequence[NewRequest], *, priority: int = 0, timeout_s: float | None = None
    ) -> None: ...
    def cancel(self, request_id: str, index: int | None = None) -> None: ...
    def status(self, timeout_s: float = 5.0) -> Status: ...
    def trace(self, num_steps: int, timeout_s: float = 60.0) -> list[RankTrace]: ...


class Backend:
    """Opens requests on an engine.

    Args:
        engine: started.
        tokenizer: the checkpoint's; None: replies have ids only.
        reader: of the model's fields and prompts.
        defaults: the operator's, for requests that do not say.
        signal: set whenever a request that `open` opened has something new.
        model_name: what users call the model.
        chat_template: None: Llama-2's, if there is a tokenizer.
        tracer: of spans; None: none are made.
        grammars: looks at users' grammars; None: the reader does, here and now.

    Attributes:
        health: what probes are told, and whether anything new is taken.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        reader: RequestReader,
        defaults: Defaults,
        signal: threading.Event,
        model_name: str = "llama",
        chat_template: ChatTemplate | None = None,
        tracer: RequestTracer | None = None,
        grammars: GrammarChecker | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.reader = reader
        self.defaults = defaults
        self.signal = signal
        self.model_name = model_name
        self.tracer = tracer
        template = chat_template or default_template(tokenizer)
        self.chat_template = None if template is None else template.within(reader.max_seq_len)
        self.started_s = int(time.time())
        self.health = Health(engine)
        self._preparer = Preparer(self.cancel)
        self._patient = copy.copy(self)  # opens what takes time, in the preparer's threads
        if grammars is not None:
            self.reader = reader.with_check(grammars.recall)
            self._patient.reader = reader.with_check(grammars.check)

    def open(
        self, request_id: str, parameters: Mapping[str, Any], headers: Mapping[str, Any], stream: bool = True
    ) -> Pending | Reply:
        """`serve` for TorchServe; see `read_request`. Netty does not count headers."""
        request = read_request(parameters, headers)
        if (count := len(request.headers.keys() - {"url_path"})) > MAX_HEADERS:
            said = f"a request may have {MAX_HEADERS} headers, this one has {count}"
            return refusal_reply(request.path, Refusal(431, said))
        return self.serve(request_id, request, self.signal, stream)

    def serve(self, request_id: str, request: HttpRequest, signal: Signal, stream: bool = True) -> Pending | Reply:
        """Starts what a request asks for.

        Args:
            request_id: not in use.
            request: in whatever protocol its path names.
            signal: set whenever there is something new.
            stream: whether streams are possible.

        Returns:
            what will have the replies, or the one reply when it is known at once. Never raises.
        """
        body = request.body
        if isinstance(body, bytes | bytearray) and len(body) > _LARGE_BYTES:
            return self._serve_later(request_id, request, signal, stream)
        try:
            return self._follow(request_id, request, signal, stream)
        except UnknownGrammarError:
            return self._serve_later(request_id, request, signal, stream)

    def _serve_later(self, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
        prepared = Prepared(
            lambda: self._patient._follow(request_id, request, signal, stream),
            lambda message: refusal_reply(request.path, Refusal(503, message)),
            signal,
        )
        try:
            return self._preparer.start(prepared)
        except OverloadedError as e:
            return refusal_reply(request.path, Refusal(e.status, str(e), Retry_After=str(e.retry_after_s)))

    def _follow(self, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
        if self.tracer is None:
            return self._serve(request_id, request, signal, stream)
        return self.tracer.follow(lambda: self._serve(request_id, request, signal, stream), request, self.model_name)

    def _serve(self, request_id: str, request: HttpRequest, signal: Signal, stream: bool) -> Pending | Reply:
        try:
            match request.path:
                case "":
                    prediction = parse_request(request, self.defaults, self.reader)
                    return self._predict(request_id, prediction, signal, stream)
                case "health" | "health/ready":
                    return self.health.ask(signal)
                case "health/live":
                    return json_reply({"status": "alive"})
                case "status":
                    return Deferred(self._status, signal)
                case "metrics":
                    return Reply(self.engine.metrics.text(), CONTENT_TYPE)
                case path if path == "trace" or path.startswith("trace/"):
                    num_steps = _trace_steps(path)
                    return Deferred(lambda: self._trace(num_steps), signal)
            endpoint = find_endpoint(request.path)
            if endpoint is None:
                known = "health, health/live, health/ready, status, metrics, trace, " + ", ".join(sorted(ENDPOINTS))
                raise RequestError(f"there is nothing at {request.path!r}; known: {known}", status=404)
            return endpoint(self, request_id, request, signal, stream)
        except TpserveError as e:
            return error_reply(e)
        except UnknownGrammarError:
            raise
        except Exception as e:  # whatever it is, it is this request's alone
            logger.exception("request %s", request_id)
            return error_reply(e)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; dialogs go through the model's chat template.

        Raises:
            RequestError: names the prompt's field.
        """
        if self.chat_template is not None and prompt.dialog is not None:
            messages = [{"role": role, "content": content} for role, content in prompt.dialog]
            prompt = Prompt(prompt.field, self.chat_template.encode(messages, prompt.field))
        return self.reader.encode(prompt)

    def submit(
        self,
        request_id: str,
        inputs: Sequence[Input],
        make: Callable[[tuple[str, ...], list[Completion]], T],
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> T:
        """Gives prompts to the engine.

        Args:
            request_id: the engine's requests are called after it.
            inputs: one engine request each.
            make: from the engine's ids and the completions to what will have the replies.
            priority, timeout_s: see `GenerateRequest`.

        Raises:
            RequestError, EngineError: the engine takes none of them, or the end has been asked for.
        """
        if self.health.draining:
            raise EngineError("the server is shutting down")
        engine_ids = tuple(f"{request_id}/{i}" for i in range(len(inputs)))
        completions = [
            Completion(
                one.token_ids,
                one.params,
                self.tokenizer,
                one.text,
                functools.partial(self.engine.cancel, engine_id),
                one.continues,
            )
            for engine_id, one in zip(engine_ids, inputs, strict=True)
        ]
        opened = make(engine_ids, completions)
        try:
            new = [
                NewRequest(engine_id, one.token_ids, completion.params, functools.partial(opened.deliver, i))
                for i, (engine_id, one, completion) in enumerate(zip(engine_ids, inputs, completions, strict=True))
            ]
            self.engine.submit_together(new, priority=priority, timeout_s=timeout_s)
        except TpserveError:
            self.cancel(opened)
            raise
        return opened

    def cancel(self, pending: Pending) -> None:
        """Frees what the engine still does for `pending`; every front's last word about one."""
        opened = pending.end() if isinstance(pending, Prepared) else pending
        if opened is None:
            return
        if self.tracer is not None:
            self.tracer.end(opened)
        for engine_id in opened.engine_ids:
            self.engine.cancel(engine_id)

    def _status(self) -> Reply:
        try:
            return json_reply({"ranks": self.engine.status(_STATUS_TIMEOUT_S).ranks})
        except EngineError as e:
            return error_reply(e)

    def _trace(self, num_steps: int) -> Reply:
        try:
            return json_reply(chrome_trace(self.engine.trace(num_steps, _TRACE_TIMEOUT_S)))
        except EngineError as e:
            return error_reply(e)

    def _predict(self, request_id: str, prediction: Prediction, signal: Signal, stream: bool) -> OpenRequest:
        inputs = [
            Input(self.encode(prompt), prediction.params, prompt.value if isinstance(prompt.value, str) else None)
            for prompt in prediction.prompts
        ]
        if not stream:
            prediction = dataclasses.replace(prediction, stream=False)
        return self.submit(
            request_id,
            inputs,
            lambda ids, completions: OpenRequest(prediction, ids, completions, signal),
            prediction.priority,
            prediction.timeout_s,
        )


def _trace_steps(path: str) -> int:
    """Of `trace/100`; a query after the path does not come through TorchServe."""
    text = path.partition("/")[2] or "100"
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= _MAX_TRACE_STEPS):
        raise RequestError(f"steps must be from 1 to {_MAX_TRACE_STEPS}, got {shown(text)}", field="steps")
    return int(text)
