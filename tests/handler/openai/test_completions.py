"""Text completions, whole and streamed, with echo and log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from tests.handler.fakes import tokenizer
from tests.handler.openai.client import DONE, ONCE, TEXT, Client, events, ids_of, refusal
from tpserve.engine.answer import Delta
from tpserve.engine.protocol import PromptLogprob
from tpserve.engine.sampling_params import Guided, SamplingParams
from tpserve.engine.text.tokenizer import PieceKind
from tpserve.handler.openai.logprobs import CompletionLogprobs, TokenTexts

BYTES = {data[0]: i for i, (kind, _, data) in enumerate(tokenizer().pieces) if kind is PieceKind.BYTES}


def test_the_text_continues_the_prompts() -> None:
    client = Client()
    told = client.answer(TEXT, ONCE, "a time", num_cached_tokens=2)
    assert (told["id"], told["object"], told["model"]) == ("cmpl-r", "text_completion", "llama")
    assert told["choices"] == [{"index": 0, "text": " a time", "logprobs": None, "finish_reason": "stop"}]
    assert told["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}
    }  # fmt: skip


def test_a_guided_answer_is_what_the_grammar_says() -> None:
    told = Client().answer(TEXT, ONCE | {"guided_choice": ["a", "cat"]}, "cat")
    assert told["choices"][0]["text"] == "cat"


def test_what_reaches_the_engine() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"echo": True, "guided_json": {"type": "integer"}, "top_k": 5})
    ids, params = client.asked()
    assert ids == tokenizer().encode("once upon", bos=True, eos=False)
    guided = Guided("json", '{"type": "integer"}')
    assert params == SamplingParams(temperature=1.0, max_new_tokens=16, guided=guided, top_k=5)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("once", ["once"]),
        (["once", "two three"], ["once", "two three"]),
        (ids_of("once upon"), [ids_of("once upon")]),
        ([ids_of("once"), "two", ids_of("two")], [ids_of("once"), "two", ids_of("two")]),
    ],
)
def test_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    client = Client()
    assert client.ask(TEXT, {"prompt": prompt, "echo": True}) is None
    for i, one in enumerate(expected):
        ids = tokenizer().encode(one, bos=True, eos=False) if isinstance(one, str) else one
        assert client.asked(i)[0] == ids
        client.say("cat", "stop", i)
    texts = [one if isinstance(one, str) else tokenizer().decode(one) for one in expected]
    assert [choice["text"] for choice in client.whole()["choices"]] == [text + " cat" for text in texts]


@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_counts_through(stream: bool) -> None:
    client = Client()
    client.ask(TEXT, {"prompt": ["one", "two"], "n": 2, "stream": stream, "stream_options": None})
    for prompt, answer, text in [(1, 1, "a"), (0, 1, "cat"), (1, 0, "dog"), (0, 0, "the")]:
        client.say(text, "stop", prompt, index=answer)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(client.take())[:-1]]
    else:
        told = client.whole()
        choices = told["choices"]
        assert told["usage"]["prompt_tokens"] == len(client.asked(0)[0]) + len(client.asked(1)[0])
        assert told["usage"]["completion_tokens"] == 4
    assert [(c["index"], c["text"]) for c in choices] == [(0, " the"), (1, " cat"), (2, " dog"), (3, " a")]


def test_a_stream_with_echo_and_usage() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"stream": True, "echo": True, "stream_options": {"include_usage": True}})
    chunks = []
    for text, finish in [("a", None), ("time", "length")]:
        client.say(text, finish)
        chunks += events(client.take())
    *told, usage, done = chunks
    assert [chunk["choices"][0]["text"] for chunk in told] == ["once upon a", " time"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None, "length"]
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 5, DONE)
    assert all(chunk["usage"] is None for chunk in told)


def test_half_a_character_at_the_prompts_end_is_completed() -> None:
    client = Client()
    first, second = "\u00e9".encode()
    client.ask(TEXT, {"prompt": [*ids_of("once"), BYTES[first]]})
    client.engine.say("r/0", [BYTES[second]], "stop")
    assert client.whole()["choices"][0]["text"] == "\u00e9"


def scored(ids: list[int], num_tops: int = 1) -> list[PromptLogprob | None]:
    return [None, *(PromptLogprob(-float(i), [(7, -0.5), (8, -0.6)][:num_tops]) for i in range(1, len(ids)))]


def test_logprobs_and_offsets() -> None:
    told = Client().answer(
        TEXT, ONCE | {"logprobs": 1}, "a time", logprobs=[-1.0, -2.0],
        top_logprobs=[[(ids_of("a")[0], -1.0)], [(tokenizer().eos_id, -0.5)]],
    )  # fmt: skip
    assert told["choices"][0]["logprobs"] == {
        "tokens": [" a", " time"],
        "token_logprobs": [-1.0, -2.0],
        "top_logprobs": [{" a": -1.0}, {"</s>": -0.5, " time": -2.0}],
        "text_offset": [0, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_logprobs_scores_the_prompt(max_tokens: int, stream: bool) -> None:
    client = Client()
    given = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
    client.ask(TEXT, {"prompt": "  once upon"} | given)
    ids, params = client.asked()
    assert (params.max_new_tokens, params.prompt_logprobs, params.echo) == (max(max_tokens, 1), 1, False)
    a = ids_of("a")
    client.engine.say("r/0", a, "stop", prompt_logprobs=scored(ids), logprobs=[-9.0], top_logprobs=[[(7, -0.5)]])
    if stream:
        (chunk, _) = events(client.take())
        choice = chunk["choices"][0]
    else:
        told = client.whole()
        choice = told["choices"][0]
        assert told["usage"]["completion_tokens"] == min(max_tokens, 1)
    logprobs = choice["logprobs"]
    kept = 1 if max_tokens else 0
    assert choice["text"] == "  once upon" + " a" * kept
    assert choice["finish_reason"] == ("stop" if max_tokens else "length")
    names = [" a"] * kept
    assert logprobs["tokens"][0] == "<s>"
    assert logprobs["tokens"][-2 - kept :] == [" once", " upon", *names]
    assert logprobs["token_logprobs"] == [None, *(-float(i) for i in range(1, len(ids))), *([-9.0] * kept)]
    top = client_text(7)
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {top: -0.5, logprobs["tokens"][1]: -1.0}
    assert logprobs["text_offset"][-1 - kept :] == [len("  once"), *([len("  once upon")] * kept)]
    assert {len(of) for of in logprobs.values()} == {len(ids) + kept}


def test_the_end_is_a_token_where_lm_eval_takes_one_off() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"echo": True, "logprobs": 1, "max_tokens": 1})
    ids, params = client.asked()
    assert params.ignore_eos
    client.engine.say("r/0", [tokenizer().eos_id], "length", prompt_logprobs=scored(ids), logprobs=[-0.1],
                      top_logprobs=[[]])  # fmt: skip
    (choice,) = client.whole()["choices"]
    assert choice["text"] == "once upon"
    assert choice["logprobs"]["tokens"][-2:] == [" upon", "</s>"]
    for given in ({"echo": True, "max_tokens": 1}, {"logprobs": 1, "max_tokens": 1}, {"echo": True, "logprobs": 1}):
        client = Client()
        client.ask(TEXT, ONCE | given)
        assert not client.asked()[1].ignore_eos, given


def client_text(token_id: int) -> str:
    kind, _, data = tokenizer().pieces[token_id]
    assert kind is PieceKind.BYTES
    return data.decode()


def test_no_token_without_echo_is_no_text() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"max_tokens": 0, "best_of": 4, "logprobs": 2})
    assert (client.asked()[1].logprobs, client.asked()[1].num_choices) == (None, 1)
    client.say("cat", "stop")
    told = client.whole()
    assert (told["choices"][0]["text"], told["usage"]["completion_tokens"]) == ("", 0)
    assert told["choices"][0]["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def test_the_prompts_logprobs_stand_first_whoever_answers_first() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"n": 2, "echo": True, "logprobs": 0, "stream": True})
    ids, _ = client.asked()
    client.say("a", index=1, logprobs=[-1.0])
    assert client.take() is None
    client.say("a", "stop", index=0, logprobs=[-1.0], prompt_logprobs=scored(ids, 0))
    first, second = (chunk["choices"][0] for chunk in events(client.take()))
    assert first["logprobs"]["token_logprobs"] == second["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -1.0]
    assert (first["index"], second["index"]) == (0, 1)


def test_a_prompt_that_was_never_scored_has_no_logprobs() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"echo": True, "logprobs": 1, "timeout_s": 1})
    client.engine.say("r/0", [], "timeout")
    choice = client.whole()["choices"][0]
    assert (choice["logprobs"]["token_logprobs"], choice["finish_reason"]) == ([None] * 3, "timeout")


def test_offsets_of_a_guided_answer_behind_an_echo() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"echo": True, "logprobs": 0, "guided_choice": ["cat and"]})
    client.say("cat and", "stop", logprobs=[-1.0] * 2, prompt_logprobs=scored(client.asked()[0], 0))
    choice = client.whole()["choices"][0]
    assert choice["text"] == "once uponcat and"
    assert choice["logprobs"]["text_offset"][-2:] == [len("once upon"), len("once uponcat")]


def test_offsets_of_a_guided_answer() -> None:
    given = {"logprobs": 0, "guided_choice": ["cat and"]}
    told = Client().answer(TEXT, ONCE | given, "cat and", logprobs=[-1.0] * 2)
    assert told["choices"][0]["logprobs"]["text_offset"] == [0, len("cat")]


def test_offsets_count_in_the_prompt_as_it_was_written() -> None:
    """A tokenizer may drop what it calls needless; then its tokens' text is shorter."""
    ids = ids_of("once upon")
    logprobs = CompletionLogprobs(TokenTexts(tokenizer()), tokenizer(), ids, echo=True, continues=True)
    assert logprobs.prompt([], 0, "once   upon")["text_offset"] == [0, len("once")]
    assert logprobs.said(Delta(0, ids=ids_of("a"), logprobs=[-1.0]))["text_offset"] == [len("once   upon")]


def test_of_two_tokens_with_one_text_the_more_probable_counts() -> None:
    text = tokenizer().pieces.index((PieceKind.TEXT, "a", b""))
    told = Client().answer(
        TEXT, ONCE | {"logprobs": 2}, "the", logprobs=[-1.0], top_logprobs=[[(BYTES[ord("a")], -0.1), (text, -0.7)]]
    )
    assert told["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.1, " the": -1.0}]


def test_each_of_the_two_has_its_own_number() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"prompt_logprobs": 1, "echo": True, "logprobs": 2})
    ids, params = client.asked()
    assert params.prompt_logprobs == 2
    client.say("a", "stop", prompt_logprobs=scored(ids, 2), logprobs=[-1.0])
    choice = client.whole()["choices"][0]
    assert list(choice["prompt_logprobs"][1]) == ["7", str(ids[1])]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 3


def test_prompt_logprobs() -> None:
    client = Client()
    client.ask(TEXT, ONCE | {"prompt_logprobs": 2, "echo": True, "logprobs": 1})
    ids, params = client.asked()
    assert params.prompt_logprobs == 2
    more: dict[str, Any] = {"logprobs": [-1.0], "top_logprobs": [[(7, -0.5)]]}
    client.say("a", "stop", prompt_logprobs=scored(ids, 2), **more)
    choice = client.whole()["choices"][0]
    assert [one and list(one) for one in choice["prompt_logprobs"]] == [None, ["7", "8", str(ids[1])],
                                                                        ["7", "8", str(ids[2])]]  # fmt: skip
    assert choice["prompt_logprobs"][1][str(ids[1])] == {"logprob": -1.0, "decoded_token": " once"}
    assert choice["logprobs"]["top_logprobs"][1] == {client_text(7): -0.5, " once": -1.0}


def test_a_model_without_a_tokenizer_has_no_texts() -> None:
    client = Client()
    client.backend.tokenizer = None
    assert refusal(client.ask(TEXT, ONCE))["param"] == "prompt"
