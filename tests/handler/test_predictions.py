"""The request forms, and that nothing but a RequestError comes out of anything else."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.handler.fakes import MAX_SEQ_LEN, reader, tokenizer
from tpserve.engine.errors import RequestError
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import SamplingParams
from tpserve.handler.predictions import KNOWN_FIELDS, Defaults, Form, Prediction, parse_body, parse_request
from tpserve.handler.replies import error_reply
from tpserve.handler.torchserve import read_request

CHAT = Defaults(mode="chat")
USER = {"role": "user", "content": "hello"}


def parse(body: Any, content_type: str = "application/json", defaults: Defaults | None = None) -> Prediction:
    return parse_body(body, content_type, defaults or Defaults(), reader())


def refusal(body: Any, content_type: str = "application/json", defaults: Defaults | None = None) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, content_type, defaults)
    return caught.value


@pytest.mark.parametrize(
    "wrap", [lambda b: b, lambda b: json.dumps(b).encode(), lambda b: bytearray(json.dumps(b), "utf-8")]
)
@pytest.mark.parametrize("content_type", ["application/json", "", "application/json; charset=utf-8", "text/plain"])
def test_an_object_is_read_parsed_or_as_bytes(wrap: Any, content_type: str) -> None:
    fields = {"prompt": "東京", "max_new_tokens": 5, "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": 2**64 - 1}
    fields |= {"stream": False, "logprobs": True, "ignore_eos": True, "stop_token_ids": [7], "mode": "text_completion"}
    prediction = parse(wrap(fields), content_type)
    assert prediction.form is Form.OBJECT
    assert prediction.prompts[0].value == "東京"
    assert not prediction.stream
    assert prediction.params == SamplingParams(
        max_new_tokens=5, temperature=1.0, top_p=0.5, top_k=3, seed=2**64 - 1, logprobs=0, ignore_eos=True,
        stop_token_ids=(7,),
    )  # fmt: skip


def test_objects_stream_unless_they_say_otherwise() -> None:
    assert parse({"prompt": ""}).stream
    assert parse({"dialog": [USER], "mode": "chat"}).stream
    assert parse({"dialog": [USER]}).prompts[0].value == [("user", "hello")]
    assert parse({"prompt_token_ids": [1, 2]}).prompts[0].value == [1, 2]


def test_null_is_not_given() -> None:
    assert parse({"prompt": "x", "seed": None, "stream": None, "dialog": None}) == parse({"prompt": "x"})


@pytest.mark.parametrize(
    ("body", "content_type"), [(b"hello", ""), (bytearray(b"hello"), "text/plain"), ("hello", "text/plain")]
)
def test_raw_text_is_completed_without_streaming(body: Any, content_type: str) -> None:
    prediction = parse(body, content_type)
    assert (prediction.form, prediction.prompts[0].value, prediction.stream) == (Form.TEXT, "hello", False)


def test_a_list_of_dialogs_needs_mode_chat() -> None:
    body = [[USER], [{"role": "system", "content": "s"}, USER]]
    prediction = parse(body, defaults=CHAT)
    assert (prediction.form, len(prediction.prompts), prediction.stream) == (Form.DIALOGS, 2, False)
    assert refusal(body).field == "mode"
    assert refusal(["a", "b"], defaults=CHAT).field == "dialogs[0]"
    assert refusal([], defaults=CHAT).field == "dialog"
    assert refusal([[USER], [USER, USER]], defaults=CHAT).field == "dialogs[1]"


def test_the_operators_defaults() -> None:
    defaults = Defaults(SamplingParams(max_new_tokens=20, temperature=0.6, top_p=0.9, seed=40), 20)
    assert parse({"prompt": "x"}, defaults=defaults).params == defaults.params
    params = parse({"prompt": "x", "max_new_tokens": 10**19, "seed": 1, "temperature": 0}, defaults=defaults).params
    assert params == SamplingParams(max_new_tokens=20, temperature=0.0, top_p=0.9, seed=1)
    assert parse({"prompt": "x", "max_new_tokens": 3}, defaults=defaults).params.max_new_tokens == 3


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({}, "prompt", "no prompt"),
        ({"mode": "chat"}, "dialog", "no dialog"),
        ({"prompt": "x", "dialog": [USER]}, "dialog", "both prompt and dialog"),
        ({"prompt": "x", "mode": "chat"}, "mode", "does not go with prompt"),
        ({"dialog": [USER], "mode": "text_completion"}, "mode", "does not go with dialog"),
        ({"prompt": "x", "mode": "poetry"}, "mode", "one of text_completion, chat"),
        ({"prompt": 3}, "prompt", "must be a string"),
        ({"prompt": ["a"]}, "prompt", "must be a string"),
        ({"prompt": "a\ud800"}, "prompt", "surrogate pair at character 1"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "is empty"),
        ({"prompt_token_ids": [1, True]}, "prompt_token_ids", r"prompt_token_ids\[1\]"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids", r"got -1"),
        ({"dialog": [{"role": "assistant", "content": "x"}]}, "dialog", r"dialog\[0\] must have role 'user'"),
        ({"dialog": [{"role": "user", "content": "[INST]"}]}, "dialog", "special tag"),
        ({"dialog": [{"role": "user", "content": "\udc00"}]}, "dialog", "surrogate"),
        ({"prompt": "x", "max_new_tokns": 3}, "max_new_tokns", "did you mean 'max_new_tokens'"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", "at least 1, got 0"),
        ({"prompt": "x", "max_new_tokens": 1.5}, "max_new_tokens", "must be an integer"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens", "must be an integer, got True"),
        ({"prompt": "x", "max_new_tokens": 10**400}, "max_new_tokens", "an integer of many digits"),
        ({"prompt": "x", "temperature": -0.1}, "temperature", "from 0 to 100, got -0.1"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "must be finite"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature", "must be finite"),
        ({"prompt": "x", "temperature": 10**400}, "temperature", "64 bits"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "must be a number"),
        ({"prompt": "x", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "x", "top_p": 1.01}, "top_p", "at most 1"),
        ({"prompt": "x", "top_k": -1}, "top_k", "got -1"),
        ({"prompt": "x", "seed": 2**64}, "seed", "64 bits"),
        ({"prompt": "x", "stream": 1}, "stream", "true or false"),
        ({"prompt": "x", "stop_token_ids": [1] * 65}, "stop_token_ids", "has 65 entries, 64 are admitted"),
    ],
)  # fmt: skip
def test_a_refused_object_names_the_field(body: Any, field: str, said: str) -> None:
    error = refusal(body)
    assert (error.field, error.status) == (field, 400)
    with pytest.raises(RequestError, match=said):
        raise error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": "x"', "not JSON: .* line 1, column 15"),
        (b"[[", "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "x", "prompt": "y"}', "'prompt' is given twice"),
        (b'{"prompt": "\xff"}', "not UTF-8: .* byte 12"),
        (b"\xfe\xffraw", "not UTF-8"),
        (b"[" * 100_000, "nested 100000 levels deep, 128 are admitted"),
        (b'{"prompt": "' + b"[" * 129 + b'", "seed": ' + b"[" * 128 + b"]" * 128 + b"}", "129 levels"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "too many digits"),
        (b"", "body is empty"),
        (b" \n", "body is empty"),
        (3, "must be a JSON object"),
        (None, "must be a JSON object"),
        ("json string", "must be a JSON object"),
    ],
)  # fmt: skip
def test_a_refused_body(body: Any, said: str) -> None:
    is_text = isinstance(body, bytes) and not body.lstrip().startswith((b"{", b"["))
    with pytest.raises(RequestError, match=said):
        parse(body, "" if is_text else "application/json")


def test_a_form_without_body_says_what_to_send() -> None:
    with pytest.raises(RequestError, match="Content-Type: application/json"):
        parse_request(read_request({}, {}), Defaults(), reader())
    assert parse_request(read_request({"data": b"hi"}, {}), Defaults(), reader()).form is Form.TEXT


@pytest.mark.parametrize("field", ["prompt", "dialog", "prompt_token_ids"])
def test_a_prompt_longer_than_the_context(field: str) -> None:
    long = "one two three " * 100
    value = {"prompt": long, "dialog": [{"role": "user", "content": long}], "prompt_token_ids": [1] * MAX_SEQ_LEN}
    (prompt,) = parse({field: value[field]}).prompts
    with pytest.raises(RequestError, match=f"tokens; the context holds {MAX_SEQ_LEN}") as caught:
        reader().encode(prompt)
    assert caught.value.field == field


def test_prompts_that_a_model_cannot_take() -> None:
    with pytest.raises(RequestError, match="outside the vocabulary of 90"):
        RequestReader(None, 90, 64).encode(parse({"prompt_token_ids": [89, 90]}).prompts[0])
    with pytest.raises(RequestError, match="no tokenizer"):
        RequestReader(None, 90, 64).encode(parse({"prompt": "x"}).prompts[0])
    assert RequestReader(None, 90, 64).encode(parse({"prompt_token_ids": [89]}).prompts[0]) == [89]


READER = reader()
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), st.text(max_size=8),
    st.text(st.characters(), max_size=4), st.sampled_from(["chat", "user", "system", "assistant", "[INST]", "x"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(KNOWN_FIELDS) | st.text(max_size=4), VALUES | SCALARS, max_size=5)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": VALUES})
DIALOGS = st.lists(MESSAGES, max_size=3)
BODIES = st.one_of(
    st.binary(max_size=40), st.text(max_size=40), VALUES, OBJECTS, st.lists(DIALOGS, max_size=3),
    DIALOGS.map(lambda dialog: {"dialog": dialog}), OBJECTS.map(lambda o: json.dumps(o).encode()),
    VALUES.map(lambda v: json.dumps(v).encode()),
    st.tuples(st.sampled_from([b"{", b"[", b'{"prompt":']), st.binary(max_size=20)).map(b"".join),
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(BODIES, st.sampled_from(["", "application/json", "text/plain", "\x00;"]), st.sampled_from([Defaults(), CHAT]))
@example("\ud800", "text/plain", CHAT)
def test_never_raises_anything_but_a_request_error(body: Any, content_type: str, defaults: Defaults) -> None:
    refused: RequestError | None = None
    try:
        prediction = parse_body(body, content_type, defaults, READER)
        for prompt in prediction.prompts:
            assert all(0 <= i < tokenizer().vocab_size for i in READER.encode(prompt))
        msgspec.msgpack.encode(prediction.params)  # the engine must be able to send it
    except RequestError as e:
        refused = e
    if refused is not None:
        assert refused.status == 400
        assert json.loads(error_reply(refused).body)["error"]["field"] == refused.field
