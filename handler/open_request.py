"""One HTTP request while it is being answered: what the engine gets, and an inbox that it fills and a front empties."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError, public
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.results import said, said_of_prompt, usage, whole
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.http import Signal
from tpserve.handler.predictions import Form, Prediction
from tpserve.handler.replies import NDJSON, Reply, error_reply, failed, json_line, json_reply

if TYPE_CHECKING:
    from tpserve.handler.tracing import RequestSpan

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Input:
    """One prompt that the engine is to go on from.

    Attributes:
        params: what the user asked for.
        text: the prompt as it was written, if it was text: for `echo`.
        continues: see `Completion`.
    """

    token_ids: list[int]
    params: SamplingParams
    text: str | None = None
    continues: bool = False


class Pending(Protocol):
    """Something that will have replies."""

    @property
    def engine_ids(self) -> tuple[str, ...]: ...

    def take(self) -> Reply | None:
        """The next reply; None when there is nothing to say yet. Never called again after the last one."""

    def fail(self, message: str) -> None:
        """Makes the next reply an error."""


class Deferred:
    """A whole reply that another thread computes."""

    engine_ids: tuple[str, ...] = ()

    def __init__(self, compute: Callable[[], Reply], signal: Signal) -> None:
        self._reply: Reply | None = None
        self._compute = compute
        self._signal = signal
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._reply = self._compute()
        except Exception as e:  # nobody else would ever answer
            logger.exception("a deferred reply")
            self._reply = error_reply(e)
        self._signal.set()

    def take(self) -> Reply | None:
        return self._reply

    def fail(self, message: str) -> None:
        self._reply = error_reply(EngineError(message))


class OpenAnswers:
    """A request that the engine is working on, in whatever protocol.

    `deliver` is called by the engine's thread, everything else by the one that serves the front.

    Args:
        engine_ids: one a prompt.
        completions: likewise.
        signal: set whenever something arrives.
        stream: whether news are told as they come.
    """

    def __init__(
        self, engine_ids: tuple[str, ...], completions: list[Completion], signal: Signal, stream: bool
    ) -> None:
        self.engine_ids = engine_ids
        self.completions = completions
        self.begun = False  # a stream's first chunk has been told, and its status with it
        self.span: RequestSpan | None = None  # see `RequestTracer`
        self._stream = stream
        self._inbox: deque[tuple[int, RequestOutput]] = deque()  # thread-safe at both ends
        self._failure: str | None = None
        self._signal = signal

    @property
    def failure(self) -> str | None:
        """What has ended it before its time; None: nothing has."""
        errors = (completion.error for completion in self.completions)
        return self._failure or next((error for error in errors if error is not None), None)

    def deliver(self, index: int, output: RequestOutput) -> None:
        """Takes new tokens of the prompt number `index`."""
        if output.error is not None:
            output = msgspec.structs.replace(output, error=public(output.error))
        self._inbox.append((index, output))
        self._signal.set()

    def fail(self, message: str) -> None:
        """Ends the request with an error."""
        self._failure = message
        self._signal.set()

    def take(self) -> Reply | None:
        """The next reply, if there is anything to say. Never raises: one request's trouble is not the batch's."""
        try:
            return self._next()
        except Exception as e:
            logger.exception("request %s", self.engine_ids[0])
            return self.broken("internal error") if self.begun else self.error(e)

    def _next(self) -> Reply | None:
        while self._inbox:
            index, output = self._inbox.popleft()
            self.completions[index].add(output)
            if self.span is not None and output.token_ids:
                self.span.heard()
        error = self.failure
        if error is not None and not self.begun:
            return self.error(EngineError(error))
        if self._failure is not None:
            return self.broken(self._failure)
        if self._stream:
            return self.chunk()
        if not all(completion.finished for completion in self.completions):
            return None
        return self.whole()

    def chunk(self) -> Reply | None:
        """What a stream says now; sets `begun`. A completion's `error` ends it."""
        raise NotImplementedError

    def whole(self) -> Reply:
        """The whole reply, when all has ended."""
        raise NotImplementedError

    def error(self, error: Exception) -> Reply:
        """The whole reply when nothing has been told yet."""
        return error_reply(error)

    def broken(self, message: str) -> Reply:
        """What ends a stream that has begun and cannot go on."""
        raise NotImplementedError


class OpenRequest(OpenAnswers):
    """A prediction.

    Args:
        prediction: the request; see `OpenAnswers` for the others.
    """

    def __init__(
        self, prediction: Prediction, engine_ids: tuple[str, ...], completions: list[Completion], signal: Signal
    ) -> None:
        super().__init__(engine_ids, completions, signal, prediction.stream)
        self._form = prediction.form
        self._many = prediction.params.n > 1
        self._prompt_told = False

    def chunk(self) -> Reply | None:
        """Lines of JSON."""
        (completion,) = self.completions
        deltas = completion.take()
        if not deltas:
            return None
        lines = [said(delta, self._many) for delta in deltas]
        if not self._prompt_told and completion.prompt_logprobs is not None:
            self._prompt_told = True
            lines[0] |= said_of_prompt(completion)
        if completion.finished:
            lines[-1] |= usage(completion)
        if completion.error is not None:
            lines[-1] |= failed(completion.error)
        # A stream's first chunk must promise another; an answer that is complete already goes out as a whole.
        more = True if not completion.finished else (False if self.begun else None)
        self.begun = True
        return Reply(b"".join(map(json_line, lines)), NDJSON, more=more)

    def whole(self) -> Reply:
        """One JSON value."""
        if self._form is Form.OBJECT:
            return json_reply(whole(self.completions[0]))
        texts = [delta.text for completion in self.completions for delta in completion.take()]
        if self._form is Form.TEXT:
            return json_reply([{"generation": text} for text in texts])
        return json_reply([{"generation": {"role": "assistant", "content": text}} for text in texts])

    def broken(self, message: str) -> Reply:
        """The last line of a stream that has begun."""
        line = {"text": "", "ids": [], "finish_reason": "error", **usage(self.completions[0]), **failed(message)}
        return Reply(json_line(line), NDJSON, more=False)
