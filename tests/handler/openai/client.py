"""An OpenAI client and an engine that says what a test tells it to."""

from __future__ import annotations

import json
import threading
from typing import Any

from tests.handler.fakes import FakeEngine, settled, tokenizer
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.handler.backend import Backend
from tpserve.handler.http import HttpRequest
from tpserve.handler.open_request import Pending
from tpserve.handler.openai import reply_schema
from tpserve.handler.predictions import Defaults
from tpserve.handler.replies import Reply

CHAT, TEXT = "v1/chat/completions", "v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "one two"}]}
ONCE: dict[str, Any] = {"prompt": "once upon"}
MAX_SEQ_LEN = 1024
READER = RequestReader(tokenizer(), tokenizer().vocab_size, MAX_SEQ_LEN)
DONE = "[DONE]"


class Client:
    """Asks a backend. The request's id is "r", so that its first prompt is the engine's "r/0"."""

    def __init__(self, defaults: Defaults | None = None) -> None:
        self.engine = FakeEngine()
        self.backend = Backend(self.engine, tokenizer(), READER, defaults or Defaults(), threading.Event())
        self.pending: Pending | None = None

    def ask(self, path: str, body: Any, live: bool = True) -> Reply | None:
        """Asks; the reply if it is known at once."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = settled(self.backend.serve("r", HttpRequest(path, raw, "application/json"), threading.Event(), live))
        if isinstance(asked, Reply):
            return asked
        self.pending = asked
        return None

    def asked(self, prompt: int = 0) -> tuple[list[int], SamplingParams]:
        """What the engine was asked for."""
        ids, params, _ = self.engine.submitted[f"r/{prompt}"]
        return ids, params

    def say(self, text: str, finish: str | None = None, prompt: int = 0, **more: Any) -> None:
        """The engine says a text that goes on from what it said before."""
        self.engine.say(f"r/{prompt}", ids_of(text), finish, **more)

    def take(self) -> Reply | None:
        """The next reply."""
        assert self.pending is not None
        return self.pending.take()

    def whole(self) -> Any:
        """The one reply's JSON."""
        reply = self.take()
        assert reply is not None
        assert (reply.more, reply.content_type, reply.status) == (None, "application/json", 200)
        told = json.loads(reply.body)
        schema = reply_schema.ChatCompletion if told["object"].startswith("chat") else reply_schema.Completion
        schema.model_validate(told, strict=True)
        return told

    def answer(self, path: str, body: Any, text: str, finish: str = "stop", **more: Any) -> Any:
        """The whole reply to a request whose one answer is `text`."""
        assert self.ask(path, body) is None
        self.say(text, finish, **more)
        return self.whole()


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, bos=False, eos=False)


def text_of(ids: list[int]) -> str:
    """As an answer to a chat reads."""
    return IncrementalDetokenizer(tokenizer()).push(ids)


def refusal(reply: Reply | None) -> dict[str, Any]:
    """What an error says, with its status."""
    assert reply is not None
    assert (reply.more, reply.content_type) == (None, "application/json")
    told = json.loads(reply.body)
    reply_schema.ErrorReply.model_validate(told, strict=True)
    return {"status": reply.status, **told["error"]}


def events(reply: Reply | None) -> list[Any]:
    """A stream's data."""
    assert reply is not None
    assert (reply.content_type, reply.status) == ("text/event-stream", 200)
    lines = reply.body.decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    told = [line.removeprefix("data: ") for line in lines]
    found: list[Any] = [one if one == DONE else json.loads(one) for one in told]
    for one in found:
        if one != DONE and "error" not in one:
            chat = one["object"] == "chat.completion.chunk"
            schema = reply_schema.ChatChunk if chat else reply_schema.Completion
            schema.model_validate(one, strict=True)
    return found
