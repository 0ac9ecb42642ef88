"""Tools: what the model is told, what a call is, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.handler.fakes import tokenizer
from tests.handler.openai.client import CHAT, DONE, HELLO, Client, events, ids_of, refusal
from tpserve.engine.guided import Grammars
from tpserve.engine.sampling_params import Guided

POINT = {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"], "$defs": {
    "n": {"type": "integer"}}, "additionalProperties": False}  # fmt: skip
GO: dict[str, Any] = {"type": "function", "function": {"name": "go", "description": "Goes.", "parameters": POINT}}
STAY: dict[str, Any] = {"type": "function", "function": {"name": "stay"}}
TOOLS = HELLO | {"tools": [GO, STAY]}
NAMED = {"type": "function", "function": {"name": "go"}}
CALL = '{"name": "go", "parameters": {"x": 1}}'
GRAMMARS = Grammars(tokenizer(), tokenizer().vocab_size)


def fits(guided: Guided | None, text: str) -> bool:
    """Whether a text is one that the engine may make."""
    assert guided is not None
    matcher = GRAMMARS.matcher(guided)
    return all(matcher.advance(token_id) for token_id in ids_of(text)) and matcher.advance(tokenizer().eos_id)


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    told = (choice.get("message") or choice["delta"])["tool_calls"]
    assert len({call["id"] for call in told}) == len(told)
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in told)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in told]


def test_the_model_is_told_of_its_tools() -> None:
    client = Client()
    client.ask(CHAT, TOOLS)
    text = tokenizer().decode(client.asked()[0])
    assert '\n{"name": "go", "description": "Goes.", "parameters": {"type": "object"' in text
    assert '\n{"name": "stay"}\n' in text
    assert client.asked()[1].guided is None
    client = Client()
    client.ask(CHAT, TOOLS | {"messages": [{"role": "system", "content": "a dog"}, *HELLO["messages"]]})
    assert tokenizer().decode(client.asked()[0]).startswith("[INST] <<SYS>>\na dog\n\nYou have")


def test_none_is_as_if_there_were_no_tools() -> None:
    client = Client()
    told = client.answer(CHAT, TOOLS | {"tool_choice": "none"}, CALL)
    assert told["choices"][0]["message"]["content"] == CALL
    assert told["usage"]["prompt_tokens"] == len(tokenizer().encode("[INST] one two [/INST]", bos=True, eos=False))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, [("go", {"x": 1})]),
        (f"\n {CALL} ", [("go", {"x": 1})]),
        ('{"name": "stay", "arguments": {}}', [("stay", {})]),
        (f"[{CALL}, {CALL}]", [("go", {"x": 1})] * 2),
        ('{"name": "go", "parameters": {"x": "\\ud800"}}', [("go", {"x": "\ud800"})]),
        ('{"name": "fly", "parameters": {}}', None),
        ('{"name": "go", "parameters": 1}', None),
        ('{"name": "go", "parameters": {}, "x": 1}', None),
        ('{"name": "go", "parameters": {"x": NaN}}', None),
        ('{"name": ["go"], "parameters": {}}', None),
        (f"[{CALL}, 1]", None),
        (f"{CALL} and", None),
        ("[" * 3000, None),
        ("[]", None),
        ("the cat", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_with_auto_an_answer_that_is_exactly_a_call_is_one(text: str, expected: Any, stream: bool) -> None:
    client = Client()
    assert client.ask(CHAT, TOOLS | {"stream": stream}) is None
    chunks: list[Any] = []
    for token_id in tokenizer().encode(text, bos=False, eos=False):
        client.engine.say("r/0", [token_id])
        if stream:
            reply = client.take()
            chunks += [] if reply is None else events(reply)
    client.engine.say("r/0", [], "stop")
    if not stream:
        choice = client.whole()["choices"][0]
        content = choice["message"]["content"]
    else:
        *more, done = chunks + events(client.take())
        assert done == DONE
        choice = more[-1]["choices"][0]
        content = "".join(c["choices"][0]["delta"].get("content", "") for c in more) or None
    if expected is None:
        assert (content or "", choice["finish_reason"]) == (text, "stop")
        assert not (choice.get("message") or choice["delta"]).get("tool_calls")
    else:
        assert (content, choice["finish_reason"]) == (None, "tool_calls")
        assert calls(choice) == expected


def test_text_streams_as_it_comes_although_there_are_tools() -> None:
    client = Client()
    client.ask(CHAT, TOOLS | {"stream": True})
    client.say("the")
    assert events(client.take())[-1]["choices"][0]["delta"] == {"content": "the"}


def test_a_call_that_streams_keeps_its_logprobs() -> None:
    client = Client()
    client.ask(CHAT, TOOLS | {"stream": True, "logprobs": True})
    ids = ids_of(CALL)
    client.engine.say("r/0", ids[:2], logprobs=[-1.0] * 2)
    assert [c["choices"][0]["delta"] for c in events(client.take())] == [{"role": "assistant", "content": ""}]
    client.engine.say("r/0", ids[2:], "stop", logprobs=[-1.0] * (len(ids) - 2))
    chunk, _ = events(client.take())
    assert chunk["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    tokens = chunk["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == CALL


def test_one_call_at_most() -> None:
    client = Client()
    told = client.answer(CHAT, TOOLS | {"parallel_tool_calls": False}, f"[{CALL}]")
    assert told["choices"][0]["message"]["content"] == f"[{CALL}]"
    assert Client().answer(CHAT, TOOLS | {"parallel_tool_calls": False}, CALL)["choices"][0]["message"]["tool_calls"]


def test_required() -> None:
    client = Client()
    client.ask(CHAT, TOOLS | {"tool_choice": "required"})
    guided = client.asked()[1].guided
    assert fits(guided, CALL)
    assert fits(guided, '{"name": "stay", "parameters": {}}')
    assert not fits(guided, '{"name": "go", "parameters": {"x": "1"}}')
    assert not fits(guided, '{"name": "fly", "parameters": {}}')
    assert not fits(guided, "the cat")
    client.say(CALL, "stop")
    choice = client.whole()["choices"][0]
    assert (calls(choice), choice["finish_reason"]) == ([("go", {"x": 1})], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool(stream: bool) -> None:
    client = Client()
    client.ask(CHAT, TOOLS | {"tool_choice": NAMED, "stream": stream})
    assert fits(client.asked()[1].guided, '{"x": 1}')
    assert not fits(client.asked()[1].guided, "{}")
    client.say('{"x": 1}', "length")
    choice = events(client.take())[-2]["choices"][0] if stream else client.whole()["choices"][0]
    assert (calls(choice), choice["finish_reason"]) == ([("go", {"x": 1})], "tool_calls")


@pytest.mark.parametrize(
    ("more", "closed"), [({}, True), ({"additionalProperties": True}, False), ({"patternProperties": {"": {}}}, False)]
)
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_has_no_arguments_that_the_function_lacks(
    choice: Any, more: dict[str, Any], closed: bool
) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], **more}
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    client = Client()
    client.ask(CHAT, HELLO | {"tools": [tool], "tool_choice": choice})
    guided = client.asked()[1].guided
    form = '{"name": "go", "parameters": %s}' if choice == "required" else "%s"
    assert fits(guided, form % '{"x": 1}')
    assert fits(guided, form % '{"x": 1, "y": 2}') is not closed


def test_a_forced_call_is_held_whatever_it_begins_with() -> None:
    client = Client()
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "integer"}}}
    client.ask(CHAT, HELLO | {"tools": [tool], "tool_choice": NAMED, "stream": True})
    client.say("12", "stop")
    assert calls(events(client.take())[-2]["choices"][0]) == [("go", 12)]


def test_a_call_that_is_cut_off_keeps_its_reason() -> None:
    choice = Client().answer(CHAT, TOOLS | {"tool_choice": NAMED}, '{"x":', "length")["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"x":'
    assert choice["finish_reason"] == "length"
    choice = Client().answer(CHAT, TOOLS | {"tool_choice": "required"}, '{"name"', "length")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"name"', "length")


def test_auto_with_a_response_format_is_either() -> None:
    client = Client()
    schema = {"type": "array", "items": {"$ref": "#/$defs/one"}, "$defs": {"one": {"const": 1}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "ones", "schema": schema}}
    client.ask(CHAT, TOOLS | {"response_format": wanted})
    guided = client.asked()[1].guided
    assert fits(guided, CALL)
    assert fits(guided, "[1, 1]")
    assert not fits(guided, "[2]")
    client.say("[1, 1]", "stop")
    assert client.whole()["choices"][0]["message"]["content"] == "[1, 1]"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [GO, GO]}, "tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": [STAY]}, "tool_choice"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "required", "tools": [GO | {"function": {"name": "f", "parameters": {"type": 5}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ],
)
def test_refusals(given: dict[str, Any], param: str) -> None:
    told = refusal(Client().ask(CHAT, TOOLS | given))
    assert (told["status"], told["param"]) == (400, param)
    assert param in told["message"]


def test_a_schema_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(110):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert refusal(Client().ask(CHAT, HELLO | {"tools": [tool], "tool_choice": "required"}))["param"] == "tools"
