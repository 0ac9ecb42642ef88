"""One HTTP request while it is being answered: an inbox that the engine fills and the mailbox empties."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.results import said, said_of_prompt, usage, whole
from tpserve.handler.predictions import Form, Prediction
from tpserve.handler.replies import NDJSON, Reply, error_reply, failed, json_line, json_reply

logger = logging.getLogger(__name__)


class Pending(Protocol):
    """Something that will have replies."""

    engine_ids: tuple[str, ...]

    def take(self) -> Reply | None:
        """The next reply; None when there is nothing to say yet. Never called again after the last one."""

    def fail(self, message: str) -> None:
        """Makes the next reply an error."""


class Deferred:
    """A whole reply that another thread computes."""

    engine_ids: tuple[str, ...] = ()

    def __init__(self, compute: Callable[[], Reply], signal: threading.Event) -> None:
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


class OpenRequest:
    """A prediction that the engine is working on.

    `deliver` is called by the engine's thread, everything else by the one that serves TorchServe.

    Args:
        prediction: the request.
        engine_ids: one a prompt.
        completions: likewise.
        signal: set whenever something arrives.
    """

    def __init__(
        self,
        prediction: Prediction,
        engine_ids: tuple[str, ...],
        completions: list[Completion],
        signal: threading.Event,
    ) -> None:
        self.engine_ids = engine_ids
        self._form = prediction.form
        self._stream = prediction.stream
        self._many = prediction.params.n > 1
        self._begun = False
        self._prompt_told = False
        self._inbox: deque[tuple[int, RequestOutput]] = deque()  # thread-safe at both ends
        self._completions = completions
        self._failure: str | None = None
        self._signal = signal

    def deliver(self, index: int, output: RequestOutput) -> None:
        """Takes new tokens of the prompt number `index`."""
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
            return self._broken("internal error") if self._begun else error_reply(e)

    def _next(self) -> Reply | None:
        while self._inbox:
            index, output = self._inbox.popleft()
            self._completions[index].add(output)
        errors = (completion.error for completion in self._completions)
        error = self._failure or next((error for error in errors if error is not None), None)
        if error is not None and not self._begun:
            return error_reply(EngineError(error))
        if self._failure is not None:
            return self._broken(self._failure)
        if self._stream:
            return self._chunk()
        if not all(completion.finished for completion in self._completions):
            return None
        return self._whole()

    def _chunk(self) -> Reply | None:
        (completion,) = self._completions
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
        more = True if not completion.finished else (False if self._begun else None)
        self._begun = True
        return Reply(b"".join(map(json_line, lines)), NDJSON, more=more)

    def _whole(self) -> Reply:
        if self._form is Form.OBJECT:
            return json_reply(whole(self._completions[0]))
        texts = [delta.text for completion in self._completions for delta in completion.take()]
        if self._form is Form.TEXT:
            return json_reply([{"generation": text} for text in texts])
        return json_reply([{"generation": {"role": "assistant", "content": text}} for text in texts])

    def _broken(self, message: str) -> Reply:
        """The last line of a stream that has begun."""
        line = {"text": "", "ids": [], "finish_reason": "error", **usage(self._completions[0]), **failed(message)}
        return Reply(json_line(line), NDJSON, more=False)
