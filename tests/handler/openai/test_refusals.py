"""Whatever is wrong with a request is its own 4xx in OpenAI's form, and names the field; so are our own faults 5xx."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.handler.fakes import tokenizer
from tests.handler.frontend import Frontend
from tests.handler.openai.client import CHAT, DONE, HELLO, ONCE, TEXT, Client, events, refusal
from tpserve.engine.errors import EngineError, OverloadedError
from tpserve.handler.http import HttpRequest
from tpserve.handler.openai import reply_schema
from tpserve.handler.openai.chat_schema import ChatRequest
from tpserve.handler.openai.completion_schema import CompletionRequest
from tpserve.handler.openai.sampling_schema import Sampling
from tpserve.handler.replies import Reply

PATHS = {CHAT: HELLO, TEXT: ONCE, "tokenize": {"prompt": "one"}, "detokenize": {"tokens": [5]}}
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"n": 0}, "n"), ({"n": 1.5}, "n"), ({"n": True}, "n"),
    ({"n": 10**400}, "n"), ({"best_of": 1, "n": 2}, "best_of"), ({"best_of": 0}, "best_of"), ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"), ({"stop": 5}, "stop"), ({"stop": [""]}, "stop[0]"), ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "\ud800"}, "stop"), ({"presence_penalty": 101}, "presence_penalty"),
    ({"frequency_penalty": "x"}, "frequency_penalty"), ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"5": "x"}}, "logit_bias.5"), ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"), ({"top_p_decay": 0}, "top_p_decay"), ({"top_p_min": -1}, "top_p_min"),
    ({"top_p_reset_ids": ["x"]}, "top_p_reset_ids[0]"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"), ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"), ({"beam_width": 65}, "beam_width"),
    ({"beam_width": 2, "temperature": 1}, "temperature"), ({"length_penalty": 11}, "length_penalty"),
    ({"early_stopping": "yes"}, "early_stopping"), ({"guided_json": 5}, "guided_json"),
    ({"guided_json": {"type": 5}}, "guided_json"), ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"), ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"cum_log_probs": 1}, "cum_log_probs"), ({"model": 5}, "model"), ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": 1}, "stream_options"), ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"), ({"user": 5}, "user"),
    ({"priority": 2**31}, "priority"), ({"timeout_s": 0}, "timeout_s"), ({"timeout_s": 10**400}, "timeout_s"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
]  # fmt: skip
ONLY_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"), ({"messages": "hello"}, "messages"), ({"messages": []}, "messages"),
    ({"messages": [5]}, "messages[0]"), ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "x", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "one " * 2000}]}, "messages"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 1, "max_tokens": 1}, "max_completion_tokens"), ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"), ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"response_format": "json"}, "response_format"), ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
     "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"), ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"), ({"audio": {}}, "audio"),
]  # fmt: skip
ONLY_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": {}}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"), ({"prompt": ["a", 5]}, "prompt[1]"), ({"prompt": [5, "a"]}, "prompt"),
    ({"prompt": [5, 9999]}, "prompt"), ({"prompt": [[5], [-1]]}, "prompt[1]"), ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": [True]}, "prompt"), ({"prompt": ["a"] * 257}, "prompt"), ({"prompt": "one " * 2000}, "prompt"),
    ({"prompt": ["a", [5] * 1024]}, "prompt[1]"), ({"suffix": "x"}, "suffix"), ({"echo": 1}, "echo"),
    ({"logprobs": True}, "logprobs"), ({"logprobs": 21}, "logprobs"),
]  # fmt: skip
CASES = [
    *((path, *case) for path in (CHAT, TEXT) for case in BOTH),
    *((CHAT, *case) for case in ONLY_CHAT),
    *((TEXT, *case) for case in ONLY_TEXT),
    ("tokenize", {"prompt": None}, "prompt"), ("tokenize", {"messages": HELLO["messages"]}, "prompt"),
    ("tokenize", {"prompt": 5}, "prompt"), ("tokenize", {"prompt": "\ud800"}, "prompt"),
    ("tokenize", {"prompt": None, "messages": [5]}, "messages[0]"),
    ("tokenize", {"add_special_tokens": 1}, "add_special_tokens"), ("tokenize", {"return_token_strs": 1},
                                                                  "return_token_strs"),
    ("detokenize", {"tokens": "x"}, "tokens"), ("detokenize", {"tokens": [9999]}, "tokens"),
    ("detokenize", {"tokens": [-1]}, "tokens"), ("detokenize", {"tokens": None}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "given", "param"), CASES)
def test_a_bad_value_is_400_and_names_its_field(path: str, given: dict[str, Any], param: str) -> None:
    client = Client()
    told = refusal(client.ask(path, PATHS[path] | given))
    assert (told["status"], told["param"], told["type"]) == (400, param, "invalid_request_error")
    assert param in told["message"]
    assert client.engine.submitted == {}


def test_what_must_be_null_says_so() -> None:
    assert refusal(Client().ask(TEXT, ONCE | {"suffix": "x"}))["message"] == "suffix: must be null, got 'x'"


@pytest.mark.parametrize(
    ("path", "given", "said"),
    [
        (CHAT, {"messages": [{"role": "wizard", "content": "x"}]},
         "messages[0].role: must be one of 'system', 'developer', 'user', 'assistant', 'tool', got 'wizard'"),
        (CHAT, {"stop": ["a"] * 17}, "stop has 17 entries, 16 are admitted"),
        (CHAT, {"stop": "a" * 257}, "stop has 257 characters, 256 are admitted"),
        (CHAT, {"messages": HELLO["messages"] * 4097}, "messages has 4097 entries, 4096 are admitted"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a"}}] * 129},
         "tools has 129 entries, 128 are admitted"),
        (CHAT, {"response_format": {"type": "xml"}},
         "response_format.type: must be 'text', 'json_object' or 'json_schema', got 'xml'"),
        (TEXT, {"prompt": ["a"] * 257}, "prompt has 257 entries, 256 are admitted"),
        (TEXT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias has 1025 entries, 1024 are admitted"),
        (TEXT, {"guided_regex": "a" * 8193}, "guided_regex cannot be used: at most 8192 characters, got 8193"),
        (TEXT, {"n": 129}, "n: must be at most 128, got 129"),
        (TEXT, {"n": "5"}, "n: must be an integer, got '5'"),
        (TEXT, {"stop": 5}, "stop: must be a string or a list, got 5"),
        (TEXT, {"echo": 1}, "echo: must be true or false, got 1"),
        (TEXT, {"guided_choice": []}, "guided_choice: must be a non-empty one, got []"),
    ],
)  # fmt: skip
def test_what_a_refusal_says(path: str, given: dict[str, Any], said: str) -> None:
    assert refusal(Client().ask(path, PATHS[path] | given))["message"] == said


def test_every_field_has_a_bad_value_above() -> None:
    asked = {name for _, body, _ in CASES for name in body}
    tested_elsewhere = {"tools", "tool_choice"}
    assert {*Sampling.model_fields, *ChatRequest.model_fields, *CompletionRequest.model_fields} - asked == (
        tested_elsewhere
    )


@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_json_object(path: str) -> None:
    for body in (b"", b"\xff", b"{", b"[]", b"5", b'"x"', b'{"a": 1, "a": 2}', b"[" * 100_000):
        told = refusal(Client().ask(path, body))
        assert (told["status"], told["type"]) == (400, "invalid_request_error")
    for value in (None, 5, [], "x", 1.5):
        client = Client()
        reply = client.backend.serve("r", HttpRequest(path, value), client.backend.signal)
        assert isinstance(reply, Reply)
        assert refusal(reply)["status"] == 400


@pytest.mark.parametrize("literal", ["NaN", "-Infinity", "1e999"])
@pytest.mark.parametrize("where", ["temperature", "unheard_of", "guided_json"])
def test_numbers_that_json_lacks(literal: str, where: str) -> None:
    body = json.dumps(HELLO)[:-1] + f', "{where}": {{"a": [1, {literal}]}}}}'
    assert refusal(Client().ask(CHAT, body.encode()))["status"] == 400
    client = Client()
    parsed = HELLO | {where: {"a": [1, float(literal)]}}  # as TorchServe's parser makes it
    reply = client.backend.serve("r", HttpRequest(CHAT, parsed), client.backend.signal)
    assert isinstance(reply, Reply)
    assert refusal(reply)["param"] == f"{where}.a[1]"


@pytest.mark.parametrize("path", PATHS)
def test_another_model_is_404(path: str) -> None:
    told = refusal(Client().ask(path, PATHS[path] | {"model": "gpt-4"}))
    assert (told["status"], told["param"], told["code"]) == (404, "model", "model_not_found")
    assert "gpt-4" in told["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (OverloadedError("full", retry_after_s=7), 429, "rate_limit_exceeded", (("Retry-After", "7"),)),
        (EngineError("rank 1 died"), 503, "unavailable", ()),
        (ZeroDivisionError("secret"), 500, "internal_error", ()),
    ],
)
def test_what_is_not_the_clients_fault(path: str, error: Exception, status: int, code: str, headers: Any) -> None:
    client = Client()
    client.engine.refusal = error
    reply = client.ask(path, PATHS[path])
    assert reply is not None
    told = refusal(reply)
    assert (told["status"], told["code"], told["param"], reply.headers) == (status, code, None, headers)
    assert "secret" not in told["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("finish", "message"), [("error", "rank 1 died"), ("cancelled", "the request was cancelled")])
def test_an_error_inside_a_stream_and_before_it(path: str, finish: str, message: str) -> None:
    client = Client()
    client.ask(path, PATHS[path] | {"stream": True, "stream_options": {"include_usage": True}})
    client.say("the")
    assert len(events(client.take())) in (1, 2)
    client.engine.say("r/0", [], finish, error="rank 1 died")
    reply = client.take()
    assert reply is not None
    assert reply.more is False
    error, done = events(reply)
    reply_schema.ErrorReply.model_validate(error, strict=True)
    assert (error["error"]["message"], error["error"]["code"], done) == (message, "unavailable", DONE)
    for stream in (False, True):
        client = Client()
        client.ask(path, PATHS[path] | {"stream": stream})
        client.engine.say("r/0", [], finish, error="rank 1 died")
        told = refusal(client.take())
        assert (told["status"], told["message"]) == (503, message)


def test_one_broken_prompt_breaks_the_batch() -> None:
    client = Client()
    client.ask(TEXT, {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "stream": True, "n": 2})
    for index in range(2):
        client.engine.say("r/0", [], "length", index=index)
    assert len(events(client.take())) == 2
    client.engine.say("r/1", [], "error", error="rank 1 died")
    assert "error" in events(client.take())[0]


def test_a_fault_of_ours_inside_a_stream() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"stream": True})
    client.say("the")
    client.take()
    client.engine.say("r/0", [None])  # type: ignore[list-item]
    error, done = events(client.take())
    assert (error["error"]["message"], done) == ("internal error", DONE)


def test_through_torchserve(engine: Any, frontend: Frontend) -> None:
    data = {"body": HELLO | {"stream": True}}
    about = {"body": {"content-type": "application/json"}}
    frontend.call({
        "a": (data, about | {"url_path": CHAT}), "b": ({"body": HELLO | {"n": 0}}, about | {"url_path": CHAT}),
        "c": ({}, {"url_path": "v1/models"}), "d": ({}, {"url_path": CHAT}),
    })  # fmt: skip
    engine.say("a/0", tokenizer().encode("the", bos=False, eos=False))
    frontend.call()
    engine.say("a/0", [], "stop")
    frontend.call()
    assert frontend.bodies["a"].endswith(b"data: [DONE]\n\n")
    assert "a" in frontend.chunked
    assert (frontend.status["b"], frontend.status["c"], frontend.status["d"]) == (400, 200, 400)
    assert frontend.lines("b")[0]["error"]["param"] == "n"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["auto", "function", "user", "text", "json_object", "the"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "function", "name", "text", "5"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
NAMES = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "functions", "x", "tokens"})
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(PATHS)), BODIES, st.booleans(), st.booleans())
def test_nothing_makes_it_raise(path: str, body: dict[str, Any], whole: bool, parsed: bool) -> None:
    sent = PATHS[path] | body if whole else body
    client = Client()
    raw = sent if parsed else json.dumps(sent).encode()
    reply = client.backend.serve("r", HttpRequest(path, raw, "application/json"), client.backend.signal)
    if isinstance(reply, Reply):
        if reply.status == 200:
            assert path.endswith("tokenize")
            return
        told = refusal(reply)
        assert told["status"] in (400, 404)
        assert told["param"] is None or told["param"] in told["message"]
        return
    client.pending = reply
    for engine_id, (_, params, _) in list(client.engine.submitted.items()):
        for index in range(params.num_choices if params.beam_width == 1 else params.n):
            logprobs = None if params.logprobs is None else [-1.0]
            client.engine.say(engine_id, [5], "stop", index=index, logprobs=logprobs)
    final = client.take()
    assert final is not None
    assert final.status == 200
