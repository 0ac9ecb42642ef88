"""Answers on their way to an OpenAI client: what chats and text completions share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion
from tpserve.engine.errors import EngineError
from tpserve.handler.http import Signal
from tpserve.handler.open_request import OpenAnswers
from tpserve.handler.openai.errors import error_body, error_reply
from tpserve.handler.replies import Reply, json_reply

SSE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class Head:
    """What every object of a reply begins with, and how it is told.

    Attributes:
        reply_id, created, model: as in the reply.
        kind: `object` of the whole reply.
        chunk_kind: of a stream's.
        n: answers to each prompt.
        stream: the client wants events.
        live: the front can send them one after the other; otherwise they come together at the end.
        include_usage: a last chunk has the usage.
    """

    reply_id: str
    created: int
    model: str
    kind: str
    chunk_kind: str
    n: int = 1
    stream: bool = False
    live: bool = True
    include_usage: bool = False

    def object(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One JSON object of the reply."""
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class OpenAIAnswers(OpenAnswers):
    """Tells each delta in OpenAI's words; subclasses know the choices' form.

    Args:
        head: of the reply; see `OpenAnswers` for the others.
    """

    def __init__(self, head: Head, engine_ids: tuple[str, ...], completions: list[Completion], signal: Signal) -> None:
        super().__init__(engine_ids, completions, signal, head.stream and head.live)
        self._head = head

    def choices(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """What a stream says of a delta: any number of choices, one a chunk."""
        raise NotImplementedError

    def choice(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """What a whole reply says of an answer."""
        raise NotImplementedError

    def ready(self, prompt: int) -> bool:
        """Whether a stream may tell of this prompt's answers yet."""
        return True

    def more_of_whole(self) -> dict[str, Any]:
        """Further fields of a whole reply."""
        return {}

    def num_completion_tokens(self) -> int:
        """Of all answers."""
        return sum(completion.usage.completion_tokens for completion in self.completions)

    def index(self, prompt: int, delta: Delta) -> int:
        """A choice's index."""
        return prompt * self._head.n + delta.index

    def chunk(self) -> Reply | None:
        """Events."""
        chunks: list[dict[str, Any]] = []
        failure: str | None = None
        for i, completion in enumerate(self.completions):
            if not (completion.finished or completion.error is not None or self.ready(i)):
                continue
            for delta in completion.take():
                failure = failure or _failure(completion, delta)
                if failure is None:
                    chunks += [self._chunk([choice]) for choice in self.choices(i, delta)]
        if failure is not None and not self.begun:
            return self.error(EngineError(failure))
        finished = all(completion.finished for completion in self.completions)
        if not chunks and not finished and failure is None:
            return None
        end = b""
        if failure is not None:
            end = event(error_body(503, failure)) + DONE
        elif finished:
            end = DONE
            if self._head.include_usage:
                chunks.append(self._chunk([]) | {"usage": self.usage()})
        # A stream's first chunk must promise another; what is complete already goes out as a whole.
        more = True if not end else (False if self.begun else None)
        self.begun = True
        return Reply(b"".join(map(event, chunks)) + end, SSE, more=more)

    def whole(self) -> Reply:
        """One object, or all events at once for a front that cannot stream."""
        if self._head.stream:
            reply = self.chunk()
            assert reply is not None, "all has ended"
            return reply
        choices = []
        for i, completion in enumerate(self.completions):
            for delta in completion.take():
                failure = _failure(completion, delta)
                if failure is not None:
                    return self.error(EngineError(failure))
                choices.append(self.choice(i, delta))
        reply_of = self._head.object(self._head.kind, choices) | {"usage": self.usage()}
        return json_reply(reply_of | self.more_of_whole())

    def error(self, error: Exception) -> Reply:
        """In OpenAI's words."""
        return error_reply(error)

    def broken(self, message: str) -> Reply:
        """An event that says so, and the end."""
        return Reply(event(error_body(503, message)) + DONE, SSE, more=False)

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and answers."""
        usages = [completion.usage for completion in self.completions]
        prompt, generated = sum(one.prompt_tokens for one in usages), self.num_completion_tokens()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in usages)},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head.object(self._head.chunk_kind, choices)
        return chunk | {"usage": None} if self._head.include_usage else chunk


def with_sum(choice: dict[str, Any], delta: Delta) -> dict[str, Any]:
    """A choice with its answer's sum of log-probabilities, where there is one."""
    if delta.cumulative_logprob is not None:
        choice["cumulative_logprob"] = max(delta.cumulative_logprob, -1e9)
    return choice


def _failure(completion: Completion, delta: Delta) -> str | None:
    if delta.finish_reason == "cancelled":
        return "the request was cancelled"
    return completion.error if delta.finish_reason == "error" else None
