"""What a streamed answer is: OpenAI's chunks as server-sent events, and the times at which they came. Free of torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

ERROR_CHARS = 300


@dataclasses.dataclass(slots=True)
class Answer:
    """What became of one request; times are seconds of `time.perf_counter`.

    Attributes:
        due_s: when it should have been sent: latencies count from here.
        sent_s: when it was written to a connection.
        heard_s: when each chunk with tokens came.
        ended_s: when the last of the answer came.
        prompt_tokens, output_tokens: as the server counts them; 0: it did not say.
        finished: the server said that this is all.
        error: why it is no answer; empty: it is one.
    """

    due_s: float
    sent_s: float = 0.0
    heard_s: list[float] = dataclasses.field(default_factory=list)
    ended_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: bool = False
    error: str = ""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Events:
    """Server-sent events of OpenAI's protocol, as they come.

    Args:
        answer: where they are noted.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer, self._rest = answer, b""

    def feed(self, data: bytes, now_s: float) -> None:
        """Takes what was read at `now_s`; lines may be cut anywhere."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now_s)

    def _take(self, payload: bytes, now_s: float) -> None:
        answer = self._answer
        if payload == b"[DONE]":
            answer.finished = True
            return
        try:
            chunk = _decode(payload)
        except msgspec.MsgspecError as e:
            answer.error = answer.error or f"not a chunk: {e}: {payload[:ERROR_CHARS]!r}"
            return
        if chunk.error is not None:
            answer.error = str(chunk.error)[:ERROR_CHARS]
        if chunk.usage is not None:
            answer.prompt_tokens = chunk.usage.prompt_tokens
            answer.output_tokens = chunk.usage.completion_tokens or 0
        for choice in chunk.choices:
            answer.ended_s = now_s
            if _has_tokens(choice):
                answer.heard_s.append(now_s)
            answer.finished |= choice.finish_reason is not None


def _has_tokens(choice: _Choice) -> bool:
    """Whether a chunk brings tokens: a chat's first one only says the role, a last one may only say why it ends."""
    if choice.delta is not None:
        delta = choice.delta
        return bool(delta.content or delta.reasoning_content or delta.tool_calls)
    # A completion's token without text (half a character) is a token.
    return bool(choice.text) or choice.finish_reason is None
