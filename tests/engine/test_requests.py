"""The fields of a request: types, other servers' names, and that nothing but a RequestError comes of anything."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.models import MODELS, load, tiny_model
from tpserve.engine.errors import RequestError
from tpserve.engine.limits import check_room, check_sequences, check_vocabulary
from tpserve.engine.requests import KNOWN_FIELDS, Prompt, RequestReader
from tpserve.engine.sampling_fields import ALIASES, SAMPLING_FIELDS, Vocabulary, sampling_params
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import Tokenizer

TOKENIZER = load(tiny_model())
READER = RequestReader(TOKENIZER, TOKENIZER.vocab_size, 64)
BARE = RequestReader(None, 90, 64)


def read(reader: RequestReader = READER, defaults: SamplingParams | None = None, **given: Any) -> SamplingParams:
    prompt = {} if "prompt" in given or "prompt_token_ids" in given else {"prompt_token_ids": [3]}
    return reader.read(prompt | given, defaults or SamplingParams()).params


def refusal(reader: RequestReader = READER, **given: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(reader, **given)
    assert caught.value.status == 400
    return caught.value


EVERY_FIELD: dict[str, Any] = {
    "max_new_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
    "top_p_decay": 0.9, "top_p_min": 0.2, "top_p_reset_ids": [5], "repetition_penalty": 1.2, "presence_penalty": 0.1,
    "frequency_penalty": -0.1, "logit_bias": {"5": 1.5, "7": -100}, "bad_words": [[4, 5], [6]], "stop": ["a", "b"],
    "stop_token_ids": [8], "ignore_eos": True, "seed": 3, "n": 2, "best_of": 3, "logprobs": 2, "prompt_logprobs": 1,
    "echo": True, "cum_log_probs": True, "beam_width": 1, "len_penalty": 0.5, "early_stopping": True,
    "guided_regex": "[ab]+",
}  # fmt: skip


def test_every_field() -> None:
    params = read(**EVERY_FIELD)
    expected = {name: EVERY_FIELD[name] for name in EVERY_FIELD if name != "guided_regex"}
    expected |= {"logit_bias": {5: 1.5, 7: -100.0}, "bad_words": ((4, 5), (6,)), "stop": ("a", "b")}
    expected |= {"stop_token_ids": (8,), "top_p_reset_ids": (5,), "guided": Guided("regex", "[ab]+")}
    assert params == SamplingParams(**expected)
    assert set(SAMPLING_FIELDS) == {*EVERY_FIELD, "guided_json", "guided_choice"}
    assert set(SamplingParams.__struct_fields__) == {*expected}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": False}, "logprobs", None),
        ({"prompt_logprobs": True}, "prompt_logprobs", 0),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop_token_ids": 4}, "stop_token_ids", (4,)),
        ({"top_p_reset_ids": 4}, "top_p_reset_ids", (4,)),
        ({"temperature": 1}, "temperature", 1.0),
        ({"guided_json": {"type": "null"}}, "guided", Guided("json", '{"type": "null"}')),
        ({"guided_json": '{"type": "null"}'}, "guided", Guided("json", '{"type": "null"}')),
        ({"guided_choice": ["ä", "b"]}, "guided", Guided("choice", '["ä", "b"]')),
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"max_completion_tokens": 5}, "max_new_tokens", 5),
        ({"request_output_len": 5}, "max_new_tokens", 5),
        ({"length_penalty": 2}, "len_penalty", 2.0),
        ({"random_seed": 5}, "seed", 5),
        ({"embedding_bias": {"3": 1}}, "logit_bias", {3: 1.0}),
        ({"stop_words_list": ["x"]}, "stop", ("x",)),
        ({"bad_words_list": [[3]]}, "bad_words", ((3,),)),
        ({"output_log_probs": True}, "logprobs", 0),
        ({"return_cum_log_probs": True}, "cum_log_probs", True),
        ({"min_length": 5}, "min_tokens", 5),
        ({"runtime_top_k": 5}, "top_k", 5),
        ({"runtime_top_p": 0.5}, "top_p", 0.5),
        ({"end_id": 5}, "stop_token_ids", (5,)),
    ],
)
def test_forms_and_other_names(given: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read(**given), field) == value


def test_a_dense_bias_loses_its_zeros() -> None:
    dense = [0.0] * TOKENIZER.vocab_size
    dense[4], dense[9] = 2, -1
    assert read(embedding_bias=dense).logit_bias == {4: 2.0, 9: -1.0}
    error = refusal(embedding_bias=dense[1:])
    assert (error.field, str(error)) == (
        "embedding_bias",
        f"embedding_bias has {len(dense) - 1} numbers; the vocabulary has {len(dense)} tokens",
    )
    assert refusal(embedding_bias=[*dense[1:], "x"]).field == "embedding_bias"


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("word", ["cat", " cat", "upon a time", "東京", "t", "..."])
def test_bad_words_are_banned_after_a_space_and_inside_a_word(model: Any, word: str) -> None:
    tokenizer: Tokenizer = load(model)
    params = sampling_params({"bad_words": [word, word]}, SamplingParams(), Vocabulary(tokenizer, tokenizer.vocab_size))
    assert all(tokenizer.bos_id not in ids for ids in params.bad_words)
    texts = set()
    for ids in params.bad_words:
        detokenizer = IncrementalDetokenizer(tokenizer)
        detokenizer.push(tokenizer.encode("so", bos=True, eos=False))
        texts.add(detokenizer.push(ids) + detokenizer.finish())
    bare = word.lstrip(" ") or word
    assert texts == {bare, " " + bare}


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"max_tokns": 1}, "max_tokns", "unknown field"),
        ({"max_tokens": 5, "max_new_tokens": 5}, "max_new_tokens", "both max_tokens and max_new_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens", "both max_tokens and"),
        ({"max_tokens": 0}, "max_tokens", "max_new_tokens must be at least 1, got 0"),
        ({"max_tokens": "x"}, "max_tokens", "max_tokens must be an integer"),
        ({"length_penalty": 11}, "length_penalty", "from -10 to 10"),
        ({"min_tokens": 200}, "min_tokens", r"at most max_new_tokens \(128\)"),
        ({"n": 3, "best_of": 2}, "best_of", r"at least n \(3\)"),
        ({"n": 0}, "n", "from 1 to 128"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"logprobs": "yes"}, "logprobs", "true, false or an integer"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": ["a", 3]}, "stop", r"stop\[1\] must be a string"),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 entries, 16 are admitted"),
        ({"stop": "\ud800"}, "stop", "surrogate"),
        ({"logit_bias": [[3, 1]]}, "logit_bias", "numbers; the vocabulary|must be a number"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"3": "x"}}, "logit_bias", r"logit_bias\[3\] must be a number"),
        ({"logit_bias": {"3": float("inf")}}, "logit_bias", "finite"),
        ({"logit_bias": {"3": 1, "03": 2}}, "logit_bias", "token id 3 twice"),
        ({"bad_words": "x"}, "bad_words", "a list of strings or of token ids"),
        ({"bad_words": [""]}, "bad_words", r"bad_words\[0\] is empty"),
        ({"bad_words": [[]]}, "bad_words", "1 to 32 tokens"),
        ({"bad_words": [[5] * 33]}, "bad_words", r"bad_words\[0\] has 33 tokens, 32 are admitted"),
        ({"stop": ["b", "a" * 257]}, "stop", r"stop\[1\] has 257 characters, 256 are admitted"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1025 entries, 1024 are admitted"),
        ({"bad_words": [[-1]]}, "bad_words", r"bad_words\[0\]\[0\] must be a token id"),
        ({"bad_words": ["x" * 10**6]}, "bad_words", "or more tokens, 32 are admitted"),
        ({"bad_words": ["x"] * 257}, "bad_words", "257 entries"),
        ({"guided_json": 3}, "guided_json", "an object or a string"),
        ({"guided_json": {"a": float("nan")}}, "guided_json", "cannot be written as JSON"),
        ({"guided_json": "{"}, "guided_json", "cannot be used"),
        ({"guided_regex": "("}, "guided_regex", "cannot be used"),
        ({"guided_choice": []}, "guided_choice", "at least one"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "no empty one"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex", "both"),
        ({"beam_width": 4, "n": 5}, "n", r"at most beam_width \(4\)"),
        ({"beam_width": 2, "temperature": 1}, "temperature", "must be 0"),
        ({"echo": 1}, "echo", "true or false"),
        ({"priority": 1.5}, "priority", "integer"),
        ({"priority": 2**31}, "priority", "from -2"),
        ({"timeout_s": 0}, "timeout_s", "positive"),
        ({"timeout_s": "soon"}, "timeout_s", "a number"),
    ],
)
def test_a_refusal_names_the_field(given: dict[str, Any], field: str, said: str) -> None:
    error = refusal(**given)
    assert error.field == field
    with pytest.raises(RequestError, match=said):
        raise error


@pytest.mark.parametrize(
    ("given", "field"),
    [({"stop": "x"}, "stop"), ({"stop_words": ["x"]}, "stop_words"), ({"echo": True}, "echo"),
     ({"bad_words": ["x"]}, "bad_words"), ({"guided_regex": "a"}, "guided_regex")],
)  # fmt: skip
def test_without_a_tokenizer_there_is_no_text(given: dict[str, Any], field: str) -> None:
    error = refusal(BARE, **given)
    assert error.field == field
    assert "no tokenizer" in str(error)


def test_defaults_are_overridden_one_by_one() -> None:
    defaults = SamplingParams(max_new_tokens=50, temperature=0.6, logprobs=3, guided=Guided("regex", "a"), best_of=2)
    params = read(defaults=defaults, logprobs=False, guided_choice=["b"], max_tokens=7)
    assert params == SamplingParams(max_new_tokens=7, temperature=0.6, guided=Guided("choice", '["b"]'), best_of=2)
    beams = read(defaults=defaults, beam_width=3)  # what was meant for sampling does not stand in its way
    assert (beams.temperature, beams.best_of) == (0.0, None)


def test_urgency() -> None:
    request = READER.read({"prompt": "the cat", "priority": -3, "timeout_s": 2}, SamplingParams())
    assert (request.priority, request.timeout_s, request.prompt_text) == (-3, 2.0, "the cat")
    request = READER.read({"prompt_token_ids": [3], "priority": None}, SamplingParams())
    assert (request.priority, request.timeout_s, request.prompt_text) == (0, None, None)


@pytest.mark.parametrize(
    ("params", "field", "said"),
    [
        ({"logit_bias": {90: 1.0}}, "logit_bias", "token id 90 .* vocabulary of 90"),
        ({"bad_words": ((1, 91),)}, "bad_words", "91"),
        ({"stop_token_ids": (90,)}, "stop_token_ids", "90"),
        ({"top_p_reset_ids": (90,)}, "top_p_reset_ids", "90"),
        ({"beam_width": 46}, "beam_width", "needs a vocabulary of 92, this one has 90"),
        ({"n": 9}, "n", "n is 9; max_num_seqs is 8"),
        ({"best_of": 9}, "best_of", "9; max_num_seqs is 8"),
        ({"beam_width": 9}, "beam_width", "9; max_num_seqs is 8"),
        # 33 tokens: two full blocks are shared, and 33 + 31 need two more each.
        ({"n": 5, "max_new_tokens": 31}, "n", "n 5 of up to 64 tokens needs 12 KV blocks; only 11 exist"),
        ({"beam_width": 5, "max_new_tokens": 999}, "beam_width", "of up to 64 tokens needs 12"),
    ],
)
def test_limits_of_model_and_cache(params: dict[str, Any], field: str, said: str) -> None:
    def check(params: SamplingParams) -> None:
        check_vocabulary(params, 90)
        check_sequences(params, 8)
        check_room(33, params, 64, 11, 16)

    with pytest.raises(RequestError, match=said) as caught:
        check(SamplingParams(**params))
    assert caught.value.field == field
    check(SamplingParams(n=4, max_new_tokens=999, logit_bias={89: 1.0}))
    check(SamplingParams(n=5, max_new_tokens=15))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 70), st.floats(), st.text(max_size=8),
    st.text("ab", max_size=3),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.just("7"), inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.sampled_from([*KNOWN_FIELDS, *ALIASES]), VALUES, max_size=4)


@settings(max_examples=1500, deadline=None)
@given(OBJECTS, st.sampled_from([READER, BARE]))
def test_nothing_but_a_request_error(given: dict[str, Any], reader: RequestReader) -> None:
    try:
        request = reader.read({"prompt_token_ids": [3]} | given, SamplingParams())
    except RequestError:
        return
    msgspec.msgpack.encode(request.params)  # the engine must be able to send it


def test_ids_are_ids_wherever_they_stood() -> None:
    assert READER.encode(Prompt("prompt[1]", [3, 4])) == [3, 4]
    with pytest.raises(RequestError, match=r"^token id 9999 is outside") as caught:
        READER.encode(Prompt("prompt[1]", [3, 9999]))
    assert caught.value.field == "prompt[1]"
