"""One HTTP request while it is being answered: an inbox that the engine fills and the mailbox empties."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tpserve.engine.errors import EngineError
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import Tokenizer
from tpserve.handler.predictions import Form, Prediction
from tpserve.handler.replies import NDJSON, Generated, Reply, error_reply, json_reply

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
        self._reply = self._compute()
        self._signal.set()

    def take(self) -> Reply | None:
        return self._reply

    def fail(self, message: str) -> None:
        self._reply = error_reply(EngineError(message))


class _Sequence:
    """Tokens and text of one prompt's answer."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_tokens: int, logprobs: bool) -> None:
        self._detokenizer = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._logprobs = logprobs
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self.error: str | None = None
        self.finished = False
        self.said = self._nothing()

    def _nothing(self) -> Generated:
        return Generated(logprobs=[] if self._logprobs else None)

    def add(self, output: RequestOutput) -> None:
        said = self.said
        said.ids += output.token_ids
        if said.logprobs is not None:
            said.logprobs += output.logprobs or []
        self._completion_tokens += len(output.token_ids)
        if self._detokenizer is not None:
            said.text += self._detokenizer.push(output.token_ids)
        if output.finish_reason is None:
            return
        if self._detokenizer is not None:
            said.text += self._detokenizer.finish()
        said.finish_reason = output.finish_reason
        said.prompt_tokens, said.completion_tokens = self._prompt_tokens, self._completion_tokens
        self.finished = True
        if output.finish_reason == "error":
            self.error = output.error or "the engine failed"

    def take(self) -> Generated:
        said, self.said = self.said, self._nothing()
        return said


class OpenRequest:
    """A prediction that the engine is working on.

    `deliver` is called by the engine's thread, everything else by the one that serves TorchServe.

    Args:
        prediction: the request.
        engine_ids: one a prompt.
        prompt_tokens: one a prompt.
        tokenizer: None: replies have ids and no text.
        signal: set whenever something arrives.
    """

    def __init__(
        self,
        prediction: Prediction,
        engine_ids: tuple[str, ...],
        prompt_tokens: list[int],
        tokenizer: Tokenizer | None,
        signal: threading.Event,
    ) -> None:
        self.engine_ids = engine_ids
        self._form = prediction.form
        self._stream = prediction.stream
        self._begun = False
        self._inbox: deque[tuple[int, RequestOutput]] = deque()  # thread-safe at both ends
        self._sequences = [_Sequence(tokenizer, n, prediction.params.logprobs) for n in prompt_tokens]
        self._signal = signal

    def deliver(self, index: int, output: RequestOutput) -> None:
        """Takes new tokens of the prompt number `index`."""
        self._inbox.append((index, output))
        self._signal.set()

    def fail(self, message: str) -> None:
        """Ends the request with an error."""
        self.deliver(0, RequestOutput("", finish_reason="error", error=message))

    def take(self) -> Reply | None:
        """The next reply, if there is anything to say. Never raises: one request's trouble is not the batch's."""
        try:
            return self._next()
        except Exception as e:
            logger.exception("request %s", self.engine_ids[0])
            if not self._begun:
                return error_reply(e)
            return Reply(Generated(finish_reason="error").line("internal error"), NDJSON, more=False)

    def _next(self) -> Reply | None:
        news = False
        while self._inbox:
            index, output = self._inbox.popleft()
            if not self._sequences[index].finished:
                self._sequences[index].add(output)
                news = True
        error = next((sequence.error for sequence in self._sequences if sequence.error is not None), None)
        if error is not None and not self._begun:
            return error_reply(EngineError(error))
        if self._stream:
            return self._chunk(error) if news else None
        if not all(sequence.finished for sequence in self._sequences):
            return None
        return self._whole()

    def _chunk(self, error: str | None) -> Reply:
        (sequence,) = self._sequences
        # A stream's first chunk must promise another; an answer that is complete already goes out as a whole.
        more = True if not sequence.finished else (False if self._begun else None)
        self._begun = True
        return Reply(sequence.take().line(error), NDJSON, more=more)

    def _whole(self) -> Reply:
        said = [sequence.take() for sequence in self._sequences]
        if self._form is Form.OBJECT:
            return Reply(said[0].line())
        if self._form is Form.TEXT:
            return json_reply([{"generation": one.text} for one in said])
        return json_reply([{"generation": {"role": "assistant", "content": one.text}} for one in said])
