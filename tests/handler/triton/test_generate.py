"""Triton's generate extension: its answers, and TensorRT-LLM's and FasterTransformer's fields."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.handler.fakes import FakeEngine, body, tokenizer
from tests.handler.frontend import Frontend, ids_of
from tests.handler.triton.asking import HELLO, Asking, content, events, taken
from tpserve.engine.errors import OverloadedError
from tpserve.engine.requests import RequestReader
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.handler.backend import Backend
from tpserve.handler.predictions import Defaults
from tpserve.handler.triton.fields import KNOWN_FIELDS

GENERATE, STREAM = "v2/models/ensemble/generate", "v2/models/ensemble/generate_stream"
ABOUT = {"model_name": "ensemble", "model_version": "1", "sequence_start": False, "sequence_end": False,
         "sequence_id": 0}  # fmt: skip
PROMPT = tokenizer().encode(HELLO["text_input"], bos=True, eos=False)  # type: ignore[arg-type]
CAT = ids_of("the cat")


@pytest.fixture
def asking() -> Asking:
    return Asking()


def params(given: dict[str, Any]) -> SamplingParams:
    asking = Asking()
    asking.open(GENERATE, {**HELLO, **given})
    return asking.params()


def test_an_answer(asking: Asking) -> None:
    pending = asking.open(GENERATE, {**HELLO, "id": "a7", "bad_words": "", "stop_words": ""})
    assert asking.prompt() == PROMPT
    assert asking.params() == SamplingParams(max_new_tokens=5)
    asking.say(CAT[:1])
    assert pending.take() is None
    asking.say(CAT[1:], "stop")
    assert content(pending) == {**ABOUT, "id": "a7", "text_output": "the cat"}


def test_the_prompt_stands_before_the_answer_if_it_is_asked_for(asking: Asking) -> None:
    pending = asking.open(GENERATE, {**HELLO, "exclude_input_in_output": False})
    asking.say(CAT, "stop")
    assert content(pending)["text_output"] == "once upon a time the cat"


def test_log_probabilities(asking: Asking) -> None:
    pending = asking.open(GENERATE, {**HELLO, "return_log_probs": True})
    asking.say([7, 8], "length", logprobs=[-0.5, -0.25], top_logprobs=[[], []])
    said = content(pending)
    assert (said["cum_log_probs"], said["output_log_probs"]) == (-0.75, [-0.5, -0.25])


def test_beams_are_a_list(asking: Asking) -> None:
    pending = asking.open(GENERATE, {**HELLO, "beam_width": 2, "temperature": 1.0})
    assert (asking.params().beam_width, asking.params().n, asking.params().temperature) == (2, 2, 0.0)
    asking.say(CAT, "stop", cumulative_logprob=-1.0)
    asking.say(CAT[:1], "stop", index=1, cumulative_logprob=-2.0)
    said = content(pending)
    assert (said["text_output"], said["cum_log_probs"]) == (["the cat", "the"], [-1.0, -2.0])


def test_several_sequences_are_a_list(asking: Asking) -> None:
    pending = asking.open(GENERATE, {**HELLO, "num_return_sequences": 2, "temperature": 1})
    asking.say(CAT, "stop", index=1)
    asking.say(CAT[:1], "stop")
    assert content(pending)["text_output"] == ["the", "the cat"]


def test_a_stream(asking: Asking) -> None:
    pending = asking.open(STREAM, {**HELLO, "stream": True, "return_log_probs": True})
    asking.say(CAT[:1], logprobs=[-1.0], top_logprobs=[[]])
    first = taken(pending)
    assert (first.more, events(first)) == (True, [{**ABOUT, "text_output": "the", "output_log_probs": [-1.0]}])
    asking.say(CAT[1:], "stop", logprobs=[-0.5] * len(CAT[1:]), top_logprobs=[[]] * len(CAT[1:]))
    last = taken(pending)
    assert (last.more, events(last)[0]["text_output"]) == (False, " cat")
    assert events(last)[0]["cum_log_probs"] == -1.0 - 0.5 * len(CAT[1:])


def test_a_stream_of_several_says_whose_each_event_is(asking: Asking) -> None:
    pending = asking.open(STREAM, {**HELLO, "n": 2, "temperature": 1})
    asking.say(CAT, index=1)
    assert events(taken(pending)) == [{**ABOUT, "text_output": "the cat", "sequence_index": 1}]


@pytest.mark.parametrize(("body", "can"), [({"stream": False}, True), ({}, False)])
def test_a_stream_that_is_none_is_one_event(asking: Asking, body: dict[str, Any], can: bool) -> None:
    pending = asking.open(STREAM, {**HELLO, **body}, stream=can)
    asking.say(CAT[:1])
    assert pending.take() is None
    asking.say(CAT[1:], "stop")
    reply = taken(pending)
    assert (reply.more, events(reply)) == (None, [{**ABOUT, "text_output": "the cat"}])


def test_errors_before_and_within_a_stream(asking: Asking) -> None:
    pending = asking.open(STREAM, HELLO)
    asking.say(CAT[:1])
    assert taken(pending).more
    asking.say([], "error", error="rank 1 died")
    last = taken(pending)
    assert (last.more, events(last)[-1]) == (False, {"error": "rank 1 died"})
    for path in (STREAM, GENERATE):
        pending = asking.open(path, HELLO)
        pending.fail("nobody asks")
        reply = taken(pending)
        assert (reply.status, reply.body, reply.more) == (503, b'{"error": "nobody asks"}\n', None)


def test_a_stream_that_nobody_asks_for_ends_with_an_event(asking: Asking) -> None:
    pending = asking.open(STREAM, HELLO)
    asking.say(CAT[:1])
    taken(pending)
    pending.fail("nobody asks")
    assert events(taken(pending)) == [{"error": "nobody asks"}]


def test_a_full_queue(asking: Asking) -> None:
    asking.engine.refusal = OverloadedError("full", retry_after_s=3)
    reply = asking.now(GENERATE, HELLO)
    assert (reply.status, reply.headers, reply.body) == (429, (("Retry-After", "3"),), b'{"error": "full"}\n')


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": [[7]], "min_length": [2]}, {"max_new_tokens": 7, "min_tokens": 2}),
        ({"text_input": [["once"]], "random_seed": [[3]]}, {"seed": 3}),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}),
        ({"runtime_top_k": 4, "runtime_top_p": 0.0, "temperature": 1.0}, {"temperature": 1.0, "top_k": 4}),
        ({"top_k": 0, "top_p": 0.0, "temperature": 1.0}, {"temperature": 0.0}),
        ({"length_penalty": 0.5, "repetition_penalty": 1.5}, {"len_penalty": 0.5, "repetition_penalty": 1.5}),
        ({"presence_penalty": 1, "frequency_penalty": [0.5]}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}),
        ({"stop_words": "cat"}, {"stop": ("cat",)}),
        ({"stop_words": [["cat", "", "dog"]]}, {"stop": ("cat", "dog")}),
        ({"stop_words": [["cat"], ["dog"]]}, {"stop": ("cat", "dog")}),
        ({"stop_words_list": [[CAT[0], *CAT], [1, 1 + len(CAT), *[-1] * (len(CAT) - 1)]]},
         {"stop": ("the cat",), "stop_token_ids": (CAT[0],)}),
        ({"stop_words_list": [[[9, 8], [1, 2]]], "end_id": 2}, {"stop_token_ids": (2, 9, 8)}),
        ({"stop_words_list": [[[0], [-1]]]}, {}),
        ({"bad_words_list": [[[5, 6, 7], [2, 3, -1]]]}, {"bad_words": ((5, 6), (7,))}),
        ({"bad_words": [[5, 6], [7]]}, {"bad_words": ((5, 6), (7,))}),
        ({"end_id": [[2]], "pad_id": 2, "start_id": 1}, {"stop_token_ids": (2,)}),
        ({"embedding_bias_words": ["the", "the cat"], "embedding_bias_weights": [1, 2.5]},
         {"logit_bias": {i: 2.5 + (i in ids_of("the")) for i in CAT}}),
        ({"embedding_bias_words": ""}, {}),
        ({"max_tokens": None, "parameters": {"max_tokens": 3}}, {"max_new_tokens": 3}),
        ({"max_tokens": None, "parameters": {"temperature": 0.25}}, {"max_new_tokens": 128, "temperature": 0.25}),
        ({"is_return_log_probs": True}, {"logprobs": 0, "cum_log_probs": True}),
        ({"return_log_probs": True, "return_cum_log_probs": False}, {"logprobs": 0}),
        ({"return_context_logits": False, "prompt_vocab_size": [0], "lora_config": [], "use_draft_model": False}, {}),
        ({"num_return_sequences": 2, "beam_width": 4}, {"n": 2, "beam_width": 4}),
        ({"guided_regex": "a+"}, {"guided": Guided("regex", "a+")}),
    ],
)  # fmt: skip
def test_fields(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert params(body) == SamplingParams(**{"max_new_tokens": 5} | expected)


def test_token_ids_as_the_prompt(asking: Asking) -> None:
    pending = asking.open(GENERATE, {"input_ids": [[5, 6, 7, 0]], "input_lengths": [[3]], "request_output_len": [[2]]})
    assert (asking.prompt(), asking.params()) == ([5, 6, 7], SamplingParams(max_new_tokens=2))
    asking.say(CAT, "stop")
    assert content(pending)["text_output"] == "the cat"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text_input": ["a", "b"]}, "text_input must be one text"),
        ({"text_input": 3}, "text_input must be a string"),
        ({"text_input": None}, "the request has no text_input"),
        ({"text_input": "\ud800"}, "text_input holds half a surrogate"),
        ({"input_ids": [1]}, "both text_input and input_ids"),
        ({"text_input": None, "input_ids": []}, "input_ids is empty"),
        ({"text_input": None, "input_ids": [1], "input_lengths": 2}, "input_lengths is 2, input_ids holds 1"),
        ({"text_input": None, "input_ids": [-1]}, r"input_ids[0] must be a token id"),
        ({"input_lengths": 2}, "input_lengths goes with input_ids"),
        ({"text_input": "x " * 100}, "text_input has"),
        ({"max_tokens": [5, 6]}, "max_tokens must be an integer"),
        ({"max_tokens": 0}, "max_tokens: max_new_tokens must be at least 1"),
        ({"max_tokens": 4, "request_output_len": 4}, "both max_tokens and request_output_len"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": 0.5, "beam_width": 2}, "temperature must be 0 with beam_width above 1"),
        ({"top_p": -1}, "top_p must be above 0"),
        ({"stream": True}, "generate_stream"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"return_context_logits": True}, "return_context_logits is not served"),
        ({"return_generation_logits": [[True]]}, "return_generation_logits is not served"),
        ({"prompt_embedding_table": [[0.5, 1]]}, "prompt_embedding_table is not served"),
        ({"beam_search_diversity_rate": 0.5}, "beam_search_diversity_rate is not served"),
        ({"max_token": 4}, "did you mean 'max_tokens'"),
        ({"parameters": {"temprature": 4}}, "did you mean 'temperature'"),
        ({"parameters": {"max_tokens": 4}}, "'max_tokens' is given twice: in parameters, too"),
        ({"parameters": [1]}, "parameters must be an object"),
        ({"id": [1]}, "id must be a string"),
        ({"pad_id": "x"}, "pad_id must be an integer"),
        ({"pad_id": 2**40}, "pad_id must fit into 32 bits"),
        ({"num_return_sequences": 3, "beam_width": 2}, "num_return_sequences must be at most beam_width (2), got 3"),
        ({"num_return_sequences": 0}, "num_return_sequences must be from 1 to 128"),
        ({"num_return_sequences": 2, "n": 2}, "both n and num_return_sequences"),
        ({"embedding_bias_words": ["a"], "embedding_bias_weights": [1, 2]}, "embedding_bias_weights has 2 numbers"),
        ({"embedding_bias_words": ["a" * 999], "embedding_bias_weights": 1}, "embedding_bias_words has a word of more"),
        ({"embedding_bias_words": ["a"], "embedding_bias_weights": [1], "logit_bias": {}}, "both logit_bias and"),
        ({"stop_words": [1.5]}, "stop_words[0] must be a string or token ids"),
        ({"stop_words": ["a"] * 999}, "stop_words has 999 entries"),
        ({"stop_words": [[10**6, 10**6]]}, "stop_words[0] cannot be written as text"),
        ({"bad_words_list": [[1, 2], [2, 1]]}, "bad_words_list ends a word at 1, after 2"),
        ({"bad_words_list": [[1, 2], [3, -1]]}, "bad_words_list ends a word at 3, after 0"),
        ({"exclude_input_in_output": 1}, "exclude_input_in_output must be true or false"),
    ],
)
def test_what_is_refused(asking: Asking, body: dict[str, Any], said: str) -> None:
    assert said in asking.refusal(GENERATE, {**HELLO, **body})
    assert not asking.engine.submitted


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON"),
        (b'{"text_input": "a", "temperature": NaN}', "NaN is no number"),
        (b'{"text_input": "a", "text_input": "b"}', "'text_input' is given twice"),
        (b"[]", "text_input"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bodies_that_cannot_be_read(asking: Asking, body: bytes, said: str) -> None:
    assert said in asking.refusal(GENERATE, body)


def test_a_model_without_tokenizer() -> None:
    bare = Asking(Backend(FakeEngine(), None, RequestReader(None, 90, 64), Defaults(), threading.Event()))
    pending = bare.open(GENERATE, {"input_ids": [5], "stop_words_list": [[9], [1]]})
    assert bare.params().stop_token_ids == (9,)
    bare.say([7], "stop")
    assert content(pending)["text_output"] == ""
    assert "text_input" not in bare.refusal(GENERATE, {"input_ids": [5], "stop_words_list": [[9, 8], [2, -1]]})
    assert "no tokenizer" in bare.refusal(GENERATE, HELLO)
    biased = {"input_ids": [5], "embedding_bias_words": ["a"], "embedding_bias_weights": [1]}
    assert "no tokenizer: embedding_bias_words" in bare.refusal(GENERATE, biased)


@pytest.mark.parametrize(
    "wrap", [lambda b: b, lambda b: json.dumps(b).encode(), lambda b: bytearray(json.dumps(b), "utf-8")]
)
def test_through_torchserve(frontend: Frontend, engine: FakeEngine, wrap: Any) -> None:
    frontend.call({"a": body(wrap(HELLO), url_path=f"/{STREAM}"), "b": body(wrap({}), url_path=GENERATE)})
    assert (frontend.status["b"], frontend.lines("b")) == (400, [{"error": "the request has no text_input"}])
    engine.say("a/0", CAT[:1])
    frontend.call()
    engine.say("a/0", CAT[1:], "stop")
    frontend.call()
    assert frontend.status["a"] == 200
    assert [json.loads(line[6:])["text_output"] for line in frontend.bodies["a"].split(b"\n\n") if line] == [
        "the",
        " cat",
    ]


ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)  # fmt: skip
SHARED = Asking()


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*KNOWN_FIELDS, "stream", "parameters", "id"]), ANY_JSON, max_size=4), ANY_JSON)
@example({"stop_words": [[]]}, None)
@example({"bad_words_list": [[], []]}, None)
@example({"n": "x", "beam_width": 2, "num_return_sequences": 1}, None)
@example({"embedding_bias_words": [[]], "embedding_bias_weights": {}}, 1)
@example({"top_p": 0, "top_k": [], "temperature": "x"}, {})
def test_arbitrary_json_never_raises(body: dict[str, Any], whole: Any) -> None:
    for sent in ({**HELLO, **body}, body, whole):
        for path in (GENERATE, STREAM):
            opened = SHARED.start(path, sent)
            status = getattr(opened, "status", 200)
            assert status in (200, 400, 404), getattr(opened, "body", None)
