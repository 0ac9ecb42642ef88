"""The engine as the handler uses it: opens requests, cancels them, and says how it is."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from tpserve.engine.errors import EngineError, RequestError, TpserveError
from tpserve.engine.protocol import Ready, RequestOutput, Status
from tpserve.engine.requests import PromptEncoder
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.open_request import Deferred, OpenRequest, Pending
from tpserve.handler.predictions import Defaults, Prediction, parse_request
from tpserve.handler.replies import Reply, error_reply, json_reply

_STATUS_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """The part of `EngineClient` that serving needs."""

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
    ) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def status(self, timeout_s: float = 5.0) -> Status: ...


class Backend:
    """Opens requests on an engine. Not thread-safe.

    Args:
        engine: started.
        tokenizer: the checkpoint's; None: replies have ids only.
        encoder: prompts to ids.
        defaults: the operator's, for requests that do not say.
        signal: set whenever an open request has something new.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        encoder: PromptEncoder,
        defaults: Defaults,
        signal: threading.Event,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._encoder = encoder
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
                    prediction = parse_request(parameters, headers, self._defaults)
                    return self._submit(request_id, prediction, stream)
                case "health":
                    return self.health()
                case "status":
                    return Deferred(self._status, self.signal)
                case path:
                    raise RequestError(f"there is nothing at {path!r}; known: health, status", status=404)
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

    def _submit(self, request_id: str, prediction: Prediction, stream: bool) -> OpenRequest:
        prompts = [self._encoder.encode(prompt) for prompt in prediction.prompts]
        if not stream:
            prediction = _without_stream(prediction)
        engine_ids = tuple(f"{request_id}/{i}" for i in range(len(prompts)))
        opened = OpenRequest(prediction, engine_ids, [len(ids) for ids in prompts], self._tokenizer, self.signal)
        try:
            for i, (engine_id, ids) in enumerate(zip(engine_ids, prompts, strict=True)):
                self._engine.submit(engine_id, ids, prediction.params, functools.partial(opened.deliver, i))
        except TpserveError:
            self.cancel(opened)
            raise
        return opened


def _without_stream(prediction: Prediction) -> Prediction:
    return Prediction(prediction.form, prediction.prompts, prediction.params, stream=False)
