"""Chat completions, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.handler.fakes import tokenizer
from tests.handler.openai.client import CHAT, DONE, HELLO, MAX_SEQ_LEN, Client, events, ids_of, refusal
from tpserve.engine.protocol import PromptLogprob
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.handler.predictions import Defaults


def test_a_whole_answer() -> None:
    client = Client()
    told = client.answer(
        CHAT, HELLO | {"model": "llama", "user": "me", "unheard_of": 1}, "the cat", num_cached_tokens=4
    )
    assert (told["id"], told["object"], told["model"]) == ("chatcmpl-r", "chat.completion", "llama")
    message = {"role": "assistant", "content": "the cat", "refusal": None}
    assert told["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    ids = tokenizer().encode("[INST] one two [/INST]", bos=True, eos=False)
    n, m = len(ids), len(ids_of("the cat"))
    assert told["usage"] == {
        "prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m,
        "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip


def test_what_holds_when_nothing_is_said() -> None:
    operators = SamplingParams(
        temperature=0.1,
        top_p=0.2,
        n=2,
        best_of=4,
        beam_width=3,
        logprobs=3,
        echo=True,
        repetition_penalty=1.5,
        max_new_tokens=9,
    )
    client = Client(Defaults(operators))
    client.ask(CHAT, HELLO)
    _, params = client.asked()
    assert params == SamplingParams(temperature=1.0, top_p=1.0, repetition_penalty=1.5, max_new_tokens=MAX_SEQ_LEN)
    capped = Client(Defaults(operators, max_new_tokens_cap=50))
    capped.ask(CHAT, HELLO)
    assert capped.asked()[1].max_new_tokens == 50
    capped = Client(Defaults(operators, max_new_tokens_cap=50))
    capped.ask(CHAT, HELLO | {"max_tokens": 60, "prompt_logprobs": False, "stream": True})
    assert capped.asked()[1].max_new_tokens == 50


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_every_field_reaches_the_engine(name: str) -> None:
    client = Client()
    given: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "n": 2, "best_of": 3, "seed": -1, "stop": ["a", "b"], "presence_penalty": 1,
        "frequency_penalty": -1, "logit_bias": {"5": 1.5}, "top_k": -1, "min_p": 0.1, "top_p_decay": 0.9,
        "top_p_min": 0.2, "top_p_reset_ids": [5], "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [8], "bad_words": [[4, 5]], "length_penalty": 0.5, "early_stopping": True,
        "guided_regex": "[ab]+", "prompt_logprobs": 1, "cum_log_probs": True, "logprobs": True, "top_logprobs": 2,
        "priority": 3, "timeout_s": 5, name: 7,
    }  # fmt: skip
    assert client.ask(CHAT, HELLO | given) is None
    assert client.asked()[1] == SamplingParams(
        temperature=0.5, top_p=0.9, n=2, best_of=3, seed=2**64 - 1, stop=("a", "b"), presence_penalty=1.0,
        frequency_penalty=-1.0, logit_bias={5: 1.5}, top_k=0, min_p=0.1, top_p_decay=0.9, top_p_min=0.2,
        top_p_reset_ids=(5,), repetition_penalty=1.2, min_tokens=2, ignore_eos=True, stop_token_ids=(8,),
        bad_words=((4, 5),), len_penalty=0.5, early_stopping=True, guided=Guided("regex", "[ab]+"), prompt_logprobs=1,
        cum_log_probs=True, logprobs=2, max_new_tokens=7,
    )  # fmt: skip
    assert client.engine.urgency["r/0"] == (3, 5.0)


def test_nulls_are_as_if_they_were_not_there() -> None:
    client = Client()
    names = ("temperature", "n", "stop", "logit_bias", "stream", "stream_options", "tools", "tool_choice", "max_tokens",
             "response_format", "model", "logprobs", "top_logprobs", "functions", "timeout_s")  # fmt: skip
    assert client.ask(CHAT, HELLO | dict.fromkeys(names)) is None
    _, params = client.asked()
    assert params == SamplingParams(temperature=1.0, max_new_tokens=MAX_SEQ_LEN)


def test_beam_search_is_greedy_whatever_the_default() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"beam_width": 4, "n": 2})
    assert (client.asked()[1].temperature, client.asked()[1].beam_width) == (0.0, 4)


def test_roles_and_parts() -> None:
    client = Client()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    client.ask(CHAT, {"messages": [
        {"role": "developer", "content": "a dog"}, {"role": "user", "content": parts, "name": "me", "x": 1},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "three"},
    ]})  # fmt: skip
    text = tokenizer().decode(client.asked()[0])
    assert text.startswith("[INST] <<SYS>>\na dog\n<</SYS>>\n\none\ntwo [/INST]")
    assert '{"name": "f", "parameters": {}}' in text
    assert text.endswith("three [/INST]")


def test_a_stream() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"stream": True, "stream_options": {"include_usage": True}})
    assert client.take() is None
    first, last = ids_of("the cat")
    client.engine.say("r/0", [first])
    reply = client.take()
    assert reply is not None
    assert reply.more is True
    chunks = events(reply)
    client.engine.say("r/0", [last], "length")
    reply = client.take()
    assert reply is not None
    assert reply.more is False
    *more, usage, done = events(reply)
    chunks += more
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""}, {"content": "the"}, {"content": " cat"},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 2, DONE)
    assert {(chunk["id"], chunk["object"]) for chunk in [*chunks, usage]} == {("chatcmpl-r", "chat.completion.chunk")}


@pytest.mark.parametrize("live", [True, False])
def test_a_stream_complete_at_once_and_one_that_the_front_cannot_send(live: bool) -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"stream": True}, live)
    client.say("the", "stop")
    reply = client.take()
    assert reply is not None
    assert reply.more is None
    *chunks, done = events(reply)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "the"
    assert (done, "usage" in chunks[0]) == (DONE, False)


def test_an_answer_without_text_ends_with_an_empty_delta() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"stream": True})
    client.engine.say("r/0", [], "stop")
    _, last, _ = events(client.take())
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


def test_several_answers_are_told_apart() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"n": 2, "stream": True})
    client.say("the cat", index=1)
    client.say("a dog", "stop", index=0)
    chunks = events(client.take())
    client.engine.say("r/0", [], "length", index=1)
    chunks += events(client.take())[:-1]
    said = ["".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"][0]["index"] == i)
            for i in range(2)]  # fmt: skip
    assert said == ["a dog", "the cat"]
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]

    client = Client()
    client.ask(CHAT, HELLO | {"n": 2})
    client.say("the cat", "stop", index=1)
    assert client.take() is None
    client.say("a dog", "length", index=0)
    choices = client.whole()["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "a dog", "length"), (1, "the cat", "stop"),
    ]  # fmt: skip


def test_stop_strings_end_the_text() -> None:
    told = Client().answer(CHAT, HELLO | {"stop": " cat"}, "the cat and", "length")
    assert (told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"]) == ("the", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"logprobs": True, "top_logprobs": 2, "stream": stream})
    the, cat = ids_of("the cat")
    eos, byte = tokenizer().eos_id, ids_of("\u00e9")[-1]
    tops = [[(the, -0.5), (eos, -1.0)], [(byte, -0.1), (cat, -0.2)]]
    client.engine.say("r/0", [the], logprobs=[-0.5], top_logprobs=tops[:1])
    first = client.take()
    client.engine.say("r/0", [cat], "stop", logprobs=[-float("inf")], top_logprobs=tops[1:])
    if stream:
        chunks = [*events(first)[1:], *events(client.take())[:-1]]
        content = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["content"]]
    else:
        assert first is None
        content = client.whole()["choices"][0]["logprobs"]["content"]
    bytes_of_cat = list(b" cat")
    assert content == [
        {"token": "the", "logprob": -0.5, "bytes": list(b"the"), "top_logprobs": [
            {"token": "the", "logprob": -0.5, "bytes": list(b"the")},
            {"token": "</s>", "logprob": -1.0, "bytes": None},
        ]},
        {"token": " cat", "logprob": -9999.0, "bytes": bytes_of_cat, "top_logprobs": [
            {"token": "bytes:\\xa9", "logprob": -0.1, "bytes": [0xA9]},
            {"token": " cat", "logprob": -0.2, "bytes": bytes_of_cat},
        ]},
    ]  # fmt: skip


def test_logprobs_without_tops() -> None:
    told = Client().answer(CHAT, HELLO | {"logprobs": True}, "the", logprobs=[-1.5])
    (token,) = told["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["top_logprobs"]) == ("the", -1.5, [])


def test_prompt_logprobs_and_the_sum() -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"prompt_logprobs": 1, "cum_log_probs": True})
    ids, _ = client.asked()
    scored = [None, *(PromptLogprob(-2.0, [(7, -0.5)]) for _ in ids[1:])]
    client.say("the", "stop", prompt_logprobs=scored, logprobs=[-1.5])
    told = client.whole()
    assert told["choices"][0]["cumulative_logprob"] == -1.5
    assert told["prompt_logprobs"][0] is None
    assert {key: one["logprob"] for key, one in told["prompt_logprobs"][1].items()} == {"7": -0.5, str(ids[1]): -2.0}


@pytest.mark.parametrize(
    ("wanted", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}, '{"type": "integer"}'),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, '{"type": "object"}'),
    ],
)
def test_response_formats(wanted: dict[str, Any], grammar: str | None) -> None:
    client = Client()
    client.ask(CHAT, HELLO | {"response_format": wanted})
    assert client.asked()[1].guided == (None if grammar is None else Guided("json", grammar))


def test_a_model_without_a_tokenizer_has_no_chats() -> None:
    client = Client()
    client.backend.chat_template = None
    assert refusal(client.ask(CHAT, HELLO))["param"] == "messages"
