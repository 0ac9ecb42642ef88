"""Replies as OpenAI's own client reads them; its types know every enumeration."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.handler.openai.client import CHAT, HELLO, ONCE, TEXT, Client, events
from tests.handler.openai.test_tools import CALL, TOOLS
from tests.handler.openai.test_utilities import get

LOGPROBS = {"logprobs": True, "top_logprobs": 1}
TOP: list[list[tuple[int, float]]] = [[(5, -0.5)]]


@pytest.mark.parametrize("stream", [False, True])
def test_chats(stream: bool) -> None:
    client = Client()
    options = {"stream_options": {"include_usage": True}} if stream else {}
    client.ask(CHAT, HELLO | LOGPROBS | {"stream": stream} | options)
    client.say("the", "stop", logprobs=[-1.0], top_logprobs=TOP)
    if stream:
        _, chunk, usage = map(ChatCompletionChunk.model_validate, events(client.take())[:-1])
        assert (chunk.choices[0].delta.content, chunk.choices[0].finish_reason) == ("the", "stop")
        assert usage.usage is not None
        logprobs: Any = chunk.choices[0].logprobs
    else:
        told = ChatCompletion.model_validate(client.whole())
        assert (told.choices[0].message.content, told.choices[0].finish_reason) == ("the", "stop")
        logprobs = told.choices[0].logprobs
    assert (logprobs.content[0].token, logprobs.content[0].top_logprobs[0].logprob) == ("the", -0.5)


def test_calls() -> None:
    told = ChatCompletion.model_validate(Client().answer(CHAT, TOOLS, CALL))
    assert told.choices[0].message.tool_calls is not None
    (call,) = told.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "go"
    client = Client()
    client.ask(CHAT, TOOLS | {"stream": True})
    client.say(CALL, "stop")
    chunk = ChatCompletionChunk.model_validate(events(client.take())[-2])
    assert chunk.choices[0].delta.tool_calls is not None
    assert (chunk.choices[0].delta.tool_calls[0].index, chunk.choices[0].finish_reason) == (0, "tool_calls")


def test_completions_and_models() -> None:
    told = Completion.model_validate(
        Client().answer(TEXT, ONCE | {"logprobs": 1}, "a", logprobs=[-1.0], top_logprobs=TOP)
    )
    assert told.choices[0].logprobs is not None
    assert told.choices[0].logprobs.tokens == [" a"]
    assert told.usage is not None
    assert told.usage.prompt_tokens_details is not None
    assert Model.model_validate(get("v1/models/llama")).owned_by == "tpserve"
