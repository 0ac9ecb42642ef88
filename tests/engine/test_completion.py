"""From outputs to answers: stop strings against plain searching, choices, echo, and what a token costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.models import load, tiny_model
from tpserve.engine.answer import Delta
from tpserve.engine.completion import Completion, Usage
from tpserve.engine.protocol import PromptLogprob, RequestOutput
from tpserve.engine.results import whole
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.text.detokenizer import IncrementalDetokenizer
from tpserve.engine.text.tokenizer import PieceKind

TOKENIZER = load(tiny_model())
BYTES = {data[0]: i for i, (kind, _, data) in enumerate(TOKENIZER.pieces) if kind is PieceKind.BYTES}


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, bos=False, eos=False)


def out(ids: list[int], finish: str | None = None, index: int = 0, **more: Any) -> RequestOutput:
    return RequestOutput("r", ids, finish_reason=finish, index=index, **more)


def completion(
    prompt: str = "once upon", prompt_text: str | None = None, **params: Any
) -> tuple[Completion, list[int]]:
    """And the answers that it wants to have cancelled."""
    cancelled: list[int] = []
    ids = TOKENIZER.encode(prompt, bos=True, eos=False)
    return Completion(ids, SamplingParams(**params), TOKENIZER, prompt_text, cancelled.append), cancelled


def reference(ids: list[int], stops: list[str], min_tokens: int) -> tuple[str, list[int], str]:
    """The whole text up to the match that ends first; of those, the longest."""
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    pieces = [detokenizer.push([i]) for i in ids]
    pieces[-1] += detokenizer.finish()
    text = "".join(pieces)
    starts = [len("".join(pieces[:n])) for n in range(len(ids))]
    owners = [n for n, piece in enumerate(pieces) for _ in piece]  # the token of each character
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths and owners[end - 1] + 1 > min_tokens:
            cut = end - max(lengths)
            return text[:cut], [i for i, start in zip(ids, starts, strict=True) if start < cut], "stop"
    return text, ids, "length"


def joined(deltas: list[Delta]) -> tuple[str, list[int], str | None]:
    return "".join(d.text for d in deltas), [i for d in deltas for i in d.ids], deltas[-1].finish_reason


WORDS = sorted({i for word in ("the", "cat", "and", "a", "dog", "onetwo", "t", "h", "e") for i in ids_of(word)})
TOKENS = st.one_of(st.sampled_from(WORDS), st.sampled_from([BYTES[b] for b in b"\xe6\x9d\xb1a "]))
STOPS = st.lists(st.one_of(st.text("thea cdo東\ufffd", min_size=1, max_size=4), st.sampled_from(["the cat", " a dog"])),
                 min_size=1, max_size=4)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=24), STOPS, st.integers(0, 6), st.lists(st.integers(1, 4), min_size=1))
def test_stop_strings_end_the_text_before_them(
    ids: list[int], stops: list[str], min_tokens: int, cuts: list[int]
) -> None:
    answer, cancelled = completion(stop=tuple(stops), min_tokens=min_tokens, logprobs=1)
    deltas: list[Delta] = []
    at, step = 0, 0
    while at < len(ids) and not answer.finished:
        size = cuts[step % len(cuts)]
        some, step = ids[at : at + size], step + 1
        at += len(some)
        top = [[(i, -1.0)] for i in some]
        finish = "length" if at == len(ids) else None
        answer.add(out(some, finish, logprobs=[-float(i) for i in some], top_logprobs=top))
        assert cancelled == ([0] if answer.finished and finish is None else [])
        deltas += answer.take()
    answer.add(out([5], "length"))  # what was under way when it was cancelled
    assert answer.take() == []
    expected = reference(ids, stops, min_tokens)
    assert joined(deltas) == expected
    assert [x for d in deltas for x in d.logprobs or []] == [-float(i) for i in expected[1]]
    assert [x for d in deltas for x in d.top_logprobs or []] == [[(i, -1.0)] for i in expected[1]]
    assert answer.usage.completion_tokens == len(expected[1])


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    answer, cancelled = completion(stop=("cat and",))
    said = []
    for i in ids_of("the cat a"):
        answer.add(out([i]))
        said += [delta.text for delta in answer.take()]
    assert "".join(said) in ("the ", "the")
    answer.add(out(ids_of("xdog")[1:]))
    text = "".join(said) + "".join(delta.text for delta in answer.take())
    assert text.startswith("the cat a")
    assert cancelled == []


def test_a_character_is_looked_at_once() -> None:
    """Thousands of almost matches: with rescanning this would take minutes."""
    answer, _ = completion(stop=tuple("a" * n + "b" for n in range(200, 216)), max_new_tokens=20_000)
    start_s = time.perf_counter()
    for _ in range(20_000):
        answer.add(out([BYTES[ord("a")]]))
    assert time.perf_counter() - start_s < 2
    (delta,) = answer.take()
    assert len(delta.text) == 20_000 - 215


def test_answers_are_told_apart() -> None:
    answer, _ = completion(n=2, logprobs=0)
    answer.add(out(ids_of("the"), index=1, logprobs=[-1.0] * len(ids_of("the"))))
    assert [(d.index, d.text, d.top_logprobs) for d in answer.take()] == [(1, "the", None)]
    answer.add(out(ids_of("cat"), "stop", index=1, num_cached_tokens=2))
    answer.add(out(ids_of("dog"), "length"))
    assert answer.finished
    assert [(d.index, d.text, d.finish_reason) for d in answer.take()] == [(0, "dog", "length"), (1, " cat", "stop")]
    generated = len(ids_of("the")) + len(ids_of("cat")) + len(ids_of("dog"))
    assert answer.usage == Usage(len(TOKENIZER.encode("once upon", bos=True, eos=False)), generated, 2)


def test_the_best_are_returned_when_all_have_ended() -> None:
    answer, _ = completion(n=2, best_of=4)
    assert answer.params.logprobs == 0
    words = ["the", "cat", "dog", "one"]
    means = [-3.0, -0.5, -9.0, -0.5]
    for i in (2, 0, 1, 3):
        ids = ids_of(words[i])
        assert answer.take() == []
        answer.add(out(ids, "length", i, logprobs=[means[i]] * len(ids)))
    deltas = answer.take()
    assert [(d.index, d.text, d.logprobs) for d in deltas] == [(0, "cat", None), (1, "one", None)]
    assert answer.usage.completion_tokens == len(ids_of("cat")) + len(ids_of("one"))


def test_an_answer_without_tokens_is_the_worst() -> None:
    answer, _ = completion(n=1, best_of=2)
    answer.add(out([], "stop", 0, logprobs=[]))
    answer.add(out(ids_of("dog"), "length", 1, logprobs=[-50.0] * len(ids_of("dog"))))
    assert [d.text for d in answer.take()] == ["dog"]


@pytest.mark.parametrize("prompt_text", [None, "once upon", "  once   upon"])
def test_echo_goes_on_from_the_prompt(prompt_text: str | None) -> None:
    answer, _ = completion("once upon", prompt_text, echo=True, logprobs=2, n=2)
    assert answer.params.prompt_logprobs == 2
    scored: list[PromptLogprob | None] = [None, PromptLogprob(-1.0, [(3, -1.0), (4, -2.0)])]
    answer.add(out(ids_of("a time"), "stop", prompt_logprobs=scored, logprobs=[0.0], top_logprobs=[[]]))
    answer.add(out([], "timeout", 1))
    shown = whole(answer)
    prompt = prompt_text or "once upon"
    assert [choice["text"] for choice in shown["choices"]] == [prompt + " a time", prompt]
    assert shown["prompt_logprobs"] == [None, -1.0]
    assert shown["prompt_top_logprobs"] == [None, [(3, -1.0), (4, -2.0)]]
    assert shown["choices"][0]["ids"] == ids_of("a time")


@pytest.mark.parametrize(("continues", "text"), [(False, "a time"), (True, " a time")])
def test_an_answer_may_continue_the_prompts_text(continues: bool, text: str) -> None:
    ids = TOKENIZER.encode("once upon", bos=True, eos=False)
    answer = Completion(ids, SamplingParams(), TOKENIZER, continues=continues)
    answer.add(out(ids_of("a time"), "length"))
    assert [delta.text for delta in answer.take()] == [text]


def test_cumulative_logprobs_come_at_the_end() -> None:
    answer, _ = completion(cum_log_probs=True)
    answer.add(out([5, 6], logprobs=[-1.0, -0.5]))
    assert answer.take()[0].cumulative_logprob is None
    answer.add(out([7], "length", logprobs=[-2.0]))
    (last,) = answer.take()
    assert (last.cumulative_logprob, last.logprobs) == (-3.5, None)


def test_hypotheses_arrive_complete() -> None:
    answer, cancelled = completion(beam_width=4, n=2, stop=("cat",))
    assert answer.params.logprobs is None
    answer.add(out(ids_of("the cat and"), "length", 0, cumulative_logprob=-1.0))
    answer.add(out(ids_of("a dog"), "stop", 1, cumulative_logprob=-2.0))
    told = [(d.index, d.text, d.cumulative_logprob, d.finish_reason) for d in answer.take()]
    assert told == [(0, "the ", -1.0, "stop"), (1, "a dog", -2.0, "stop")]
    assert (answer.finished, cancelled) == (True, [])


def test_without_a_tokenizer_there_are_ids_only() -> None:
    answer = Completion([1, 2], SamplingParams(stop=("x",), echo=True), None)
    answer.add(out([5], "length"))
    assert [(d.text, d.ids) for d in answer.take()] == [("", [5])]


def test_errors_and_ends() -> None:
    answer, _ = completion(n=2)
    answer.add(out([], "error", 0, error="rank 1 died"))
    assert answer.error == "rank 1 died"
    answer.end("cancelled")
    assert [d.finish_reason for d in answer.take()] == ["error", "cancelled"]


def test_a_token_costs_microseconds() -> None:
    """About 2 µs on the machine this was written on; the bound is for slow and busy ones."""
    outputs = [out([i]) for i in ids_of("once upon a time there was the cat and a dog") * 1000]
    best_s = float("inf")
    for _ in range(3):
        answer, _ = completion(max_new_tokens=100_000)
        start_s = time.perf_counter()
        for output in outputs:
            answer.add(output)
            answer.take()
        best_s = min(best_s, time.perf_counter() - start_s)
    assert best_s / len(outputs) < 50e-6
