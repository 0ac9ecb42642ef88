"""The client that times streams: what it hears, when, and what it calls an error."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.bench.server import Conversation, Known, known, steady, usage
from tpserve.bench.serve_events import Answer, Events
from tpserve.bench.serve_http import Client

BODY = b'{"prompt": [5, 6, 7], "max_tokens": 6}'
CHOICE = {"choices": [{"text": "a", "finish_reason": None}]}


def ask(server: Known, times: int = 1, timeout_s: float = 10.0) -> list[Answer]:
    """One request after the other on one client."""

    async def run() -> list[Answer]:
        client = Client(server.url, "key", timeout_s)
        found = [await client.stream("/v1/completions", BODY, time.perf_counter()) for _ in range(times)]
        await client.close()
        return found

    return asyncio.run(run())


def test_times_are_those_of_the_server() -> None:
    with known(steady(0.2, 0.05)) as server:
        (answer,) = ask(server)
    assert (answer.error, answer.prompt_tokens, answer.output_tokens, len(answer.heard_s)) == ("", 3, 6, 6)
    first_s, last_s = answer.heard_s[0] - answer.due_s, answer.ended_s - answer.due_s
    # Never sooner than the server says them (its moments wait for nobody); later by what a loaded machine takes.
    assert 0.199 < first_s < 1
    assert 0.449 < last_s < first_s + 1
    assert server.headers[-1]["authorization"] == "Bearer key"


def test_a_connection_is_used_again_unless_the_server_closes_it() -> None:
    with known(steady(0, 0)) as server:
        assert [answer.error for answer in ask(server, 3)] == [""] * 3
        assert server.connections == 1

    async def close_after(body: dict[str, Any], say: Conversation) -> None:
        await steady(0, 0)(body, say)
        say.writer.close()  # without having said so: the next request finds out

    with known(close_after) as server:
        assert [answer.error for answer in ask(server, 3)] == [""] * 3
        assert server.connections == 3


def test_events_may_be_cut_anywhere() -> None:
    stream = (
        b': a comment\r\n\r\ndata: {"choices":[{"text":"\xc3\xa9","finish_reason":null}]}\r\n\r\n'
        b'data:{"choices":[{"text":"","finish_reason":null}]}\n\n'
        b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    )
    for size in (1, 7, len(stream)):
        answer = Answer(0.0)
        events = Events(answer)
        for i in range(0, len(stream), size):
            events.feed(stream[i : i + size], float(i))
        assert (answer.error, answer.finished, len(answer.heard_s), answer.output_tokens) == ("", True, 2, 2)


def test_a_chats_role_is_no_token() -> None:
    answer = Answer(0.0)
    chunks = [{"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning_content": "b"}, {}]
    for now_s, delta in enumerate(chunks):
        text = json.dumps({"choices": [{"delta": delta, "finish_reason": None}]})
        Events(answer).feed(f"data: {text}\n\n".encode(), float(now_s))
    assert answer.heard_s == [1.0, 2.0]


async def _refuses(body: dict[str, Any], say: Conversation) -> None:
    await say.raw(b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\nfull now")


async def _hangs_up(body: dict[str, Any], say: Conversation) -> None:
    await say.head()
    await say.event(CHOICE)
    say.writer.close()


async def _leaves_out_the_end(body: dict[str, Any], say: Conversation) -> None:
    await say.head()
    await say.event(CHOICE)
    await say.event(usage(3, 1))
    await say.end()


async def _fails_inside(body: dict[str, Any], say: Conversation) -> None:
    await say.head()
    await say.event(CHOICE)
    await say.event({"error": {"message": "the engine died"}})
    await say.end()


async def _says_nothing(body: dict[str, Any], say: Conversation) -> None:
    await say.head()
    await say.event("[DONE]")
    await say.end()


async def _is_no_chunk(body: dict[str, Any], say: Conversation) -> None:
    await say.head()
    await say.event('{"choices": 5}')
    await say.end()


async def _is_silent(body: dict[str, Any], say: Conversation) -> None:
    await asyncio.sleep(30)


async def _is_not_http(body: dict[str, Any], say: Conversation) -> None:
    await say.raw(b"220 mail.example ready\r\n\r\n")
    say.writer.close()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (_refuses, "status 429: full now"), (_hangs_up, "the connection ended|ended in the middle"),
        (_leaves_out_the_end, "ended in the middle"), (_fails_inside, "the engine died"),
        (_says_nothing, "without a token"), (_is_no_chunk, "not a chunk"), (_is_silent, "no end after 0.3 s"),
        (_is_not_http, "not HTTP"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(reply: Any, said: str) -> None:
    with known(reply) as server:
        (answer,) = ask(server, timeout_s=0.3 if reply is _is_silent else 10.0)
    assert any(part in answer.error for part in said.split("|")), answer.error


def test_nobody_there() -> None:
    with known(steady(0, 0)) as server:
        pass
    (answer,) = ask(server)
    assert answer.error


def test_a_reply_may_end_with_its_connection() -> None:
    async def reply(body: dict[str, Any], say: Conversation) -> None:
        await say.head("200 OK", "Connection: close")
        await say.raw(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
        say.writer.close()

    with known(reply) as server:
        assert [answer.error for answer in ask(server, 2)] == ["", ""]


def test_a_url_must_be_one() -> None:
    for url in ("127.0.0.1:8080", "ftp://x", "http://"):
        with pytest.raises(ValueError, match="no URL"):
            Client(url)
