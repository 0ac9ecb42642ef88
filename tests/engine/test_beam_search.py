"""Beam search through real ranks: against all answers there are, and against the textbook's search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.helpers.groups import rank_group, with_
from tests.helpers.local import LocalEngine
from tests.helpers.plain import log_softmax
from tests.helpers.plain_beams import Answer, beam_search
from tests.helpers.plain_sampling import process
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS, VOCAB_SIZE, converted, plain_model, prompts
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams

LETTERS = (261, 265, 426)
# Nothing but these and the end can be said; the network itself hardly ever ends.
FEW_TOKENS = dict.fromkeys(set(range(VOCAB_SIZE)) - {*LETTERS, EOS}, -1e30) | {EOS: 19.0}
DEPTH = 4  # 27 beams before the last token: all of them live on when beam_width is 64


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(converted(tmp_path_factory.mktemp("beams"))),
        device="cpu",
        max_seq_len=128,
        max_num_seqs=80,
        max_num_batched_tokens=160,
        block_size=4,
        checksum_interval=4,
    )


@pytest.fixture(scope="module", params=[1, 2])
def client(request: pytest.FixtureRequest, config: EngineConfig) -> Iterator[EngineClient]:
    with rank_group(config, request.param) as client:
        yield client


@pytest.fixture(scope="module")
def all_answers() -> dict[tuple[int, ...], float]:
    """The log-probability of every answer to a prompt within `DEPTH`; EOS is the last token of those that end."""
    prompt, params, found = prompts(1, seed=3)[0], SamplingParams(logit_bias=FEW_TOKENS), {}
    for letters in itertools.product(LETTERS, repeat=DEPTH):
        logits = plain_model().logits(prompt + list(letters))[len(prompt) - 1 :]
        total = 0.0
        for i, token in enumerate(letters):
            step = log_softmax(process(logits[i], params, prompt, list(letters[:i]), EOS))
            found[(*letters[:i], EOS)] = total + float(step[EOS])
            total += float(step[token])
        found[letters] = total
    assert len(found) == 3**4 + 3**3 + 3**2 + 3 + 1
    return found


@pytest.mark.parametrize("len_penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_answers(
    client: EngineClient, all_answers: dict[tuple[int, ...], float], len_penalty: float
) -> None:
    stream = Collected(
        client, prompts(1, seed=3)[0], beam_width=64, n=64, max_new_tokens=DEPTH, len_penalty=len_penalty,
        logit_bias=FEW_TOKENS,
    )  # fmt: skip
    stream.wait()
    scores = {ids: logprob / len(ids) ** len_penalty for ids, logprob in all_answers.items()}
    best = sorted(scores.values(), reverse=True)
    said = [(*stream.answers[i], *((EOS,) if stream.finish_reasons[i] == "stop" else ())) for i in range(64)]
    assert len(set(said)) == 64
    assert [scores[ids] for ids in said] == pytest.approx(best[:64], abs=2e-5)
    assert [stream.cumulative_logprobs[i] for i in range(64)] == pytest.approx(
        [all_answers[ids] for ids in said], abs=1e-4
    )
    assert 3 < sum(ids[-1] == EOS for ids in said) < 40, "the test needs both ways to end"


SEARCHES: list[dict[str, Any]] = [
    {"beam_width": 2, "max_new_tokens": 20},
    {"beam_width": 3, "n": 3, "max_new_tokens": 20, "logit_bias": {EOS: 18.0}},
    {"beam_width": 4, "n": 2, "max_new_tokens": 20, "logit_bias": {EOS: 18.0}, "early_stopping": True},
    {"beam_width": 5, "n": 5, "max_new_tokens": 12, "len_penalty": -0.5, "logit_bias": {EOS: 16.0}},
    {"beam_width": 3, "n": 2, "max_new_tokens": 15, "stop_token_ids": (426, 432), "len_penalty": 2.0},
    {"beam_width": 2, "n": 2, "max_new_tokens": 15, "repetition_penalty": 1.2, "bad_words": ((261,), (265, 280))},
    {"beam_width": 4, "n": 4, "max_new_tokens": 12, "logit_bias": {EOS: 24.0}, "min_tokens": 5, "len_penalty": 0.0},
    {"beam_width": 5, "n": 1, "max_new_tokens": 20, "presence_penalty": 0.5, "logit_bias": {EOS: 14.0}},
    # An answer of the lowest rank that counts is among the best in the end.
    {"beam_width": 3, "n": 3, "max_new_tokens": 12, "logit_bias": {EOS: 18.0}},
    # A beam overtakes finished answers only when it is much longer.
    {"beam_width": 2, "n": 2, "max_new_tokens": 12, "logit_bias": {EOS: 27.0}, "len_penalty": 2.0},
]


def search_prompts() -> list[list[int]]:
    chosen = [prompts(4, seed=20, longest=15)[0], prompts(5, seed=21, longest=15)[3]]
    return prompts(len(SEARCHES) - 2, seed=9, longest=30) + chosen


@pytest.fixture(scope="module")
def expected() -> list[list[Answer]]:
    """What the textbook's search finds."""
    some = search_prompts()
    found = [beam_search(plain_model(), SamplingParams(**how), p, EOS) for p, how in zip(some, SEARCHES, strict=True)]
    assert min(margin for _, margin in found) > 1e-5, "rounding may decide these searches: choose others"
    assert {answer.finish_reason for answers, _ in found for answer in answers} == {"stop", "length"}
    return [answers for answers, _ in found]


def start(engine: Any) -> list[Collected]:
    some = search_prompts()
    return [Collected(engine, p, **how, logprobs=0) for p, how in zip(some, SEARCHES, strict=True)]


def check(streams: list[Collected], expected: list[list[Answer]]) -> None:
    some = search_prompts()
    for prompt, stream, answers in zip(some, streams, expected, strict=True):
        said = [(stream.answers[i], stream.finish_reasons[i]) for i in range(stream.params.n)]
        assert said == [(answer.token_ids, answer.finish_reason) for answer in answers]
        for i, answer in enumerate(answers):
            assert stream.cumulative_logprobs[i] == pytest.approx(answer.logprob, abs=1e-4)
        # These are of the network's own distribution, not of the one that is searched.
        raw = log_softmax(plain_model().logits(prompt + stream.ids)[len(prompt) - 1 : -1])
        assert stream.logprobs == pytest.approx([row[t] for row, t in zip(raw, stream.ids, strict=True)], abs=1e-4)
        assert stream.num_outputs == stream.params.n


def test_searches_beside_streams_find_what_the_textbooks_search_finds(
    client: EngineClient, expected: list[list[Answer]]
) -> None:
    neighbours = [
        Collected(client, p, max_new_tokens=60, temperature=i % 2, seed=i, ignore_eos=True)
        for i, p in enumerate(prompts(8, seed=10))
    ]
    neighbours[0].wait_tokens(3)
    searches = start(client)
    for search in searches:
        search.wait()
    check(searches, expected)
    together = [stream.wait() for stream in neighbours]
    alone = [Collected(client, p, max_new_tokens=60, temperature=i % 2, seed=i, ignore_eos=True)
             for i, p in enumerate(prompts(8, seed=10))]  # fmt: skip
    assert [stream.wait() for stream in alone] == together


@pytest.mark.parametrize("changes", [{}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 20}])
def test_preempted_searches_find_the_same(
    config: EngineConfig, expected: list[list[Answer]], changes: dict[str, Any]
) -> None:
    engine = LocalEngine(with_(config, num_kv_blocks=40, max_num_seqs=20, **changes))
    streams = start(engine)
    neighbour = Collected(engine, [5, 6], max_new_tokens=60, ignore_eos=True)  # type: ignore[arg-type]
    engine.run()
    check(streams, expected)
    assert len(neighbour.ids) == 60
    assert engine.core.scheduler.residency.num_preemptions > 5


@pytest.mark.parametrize("caching", [True, False])
def test_beams_share_the_blocks_of_what_they_have_in_common(config: EngineConfig, caching: bool) -> None:
    engine = LocalEngine(with_(config, enable_prefix_caching=caching))
    prompt = (prompts(1, seed=11)[0] * 99)[:90]
    stream = Collected(engine, prompt, beam_width=16, n=16, max_new_tokens=20, ignore_eos=True)  # type: ignore[arg-type]
    engine.run()
    assert len(stream.finish_reasons) == 16
    shared, longest = 90 // 4, -(-110 // 4)
    assert longest < engine.peak_blocks <= shared + 16 * (longest - shared)
    assert engine.peak_blocks < 16 * longest / 4


@pytest.mark.parametrize("width", [2, 8])
def test_the_prompts_scores_are_told_as_without_a_search(config: EngineConfig, width: int) -> None:
    engine = LocalEngine(config)
    prompt, told = search_prompts()[0], []
    for asked in (SamplingParams(), SamplingParams(beam_width=width, n=2)):
        params = msgspec.structs.replace(asked, max_new_tokens=6, temperature=0.0, prompt_logprobs=1, seed=1)
        outputs: list[RequestOutput] = []
        engine.submit("a", prompt, params, outputs.append)
        engine.run()
        told.append([output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None])
    assert told[0] == told[1]
    assert [len(scores) for scores in told[1]] == [len(prompt)]


def test_a_cancelled_search_gives_everything_back(client: EngineClient) -> None:
    search = Collected(client, [1, 5], beam_width=8, max_new_tokens=100, ignore_eos=True)
    other = Collected(client, [1, 6], max_new_tokens=30, ignore_eos=True)
    other.wait_tokens(5)
    client.cancel(search.request_id)
    assert len(other.wait()) == 30
    assert {rank.num_blocks_in_use for rank in client.status().ranks} == {0}
    assert not search.finish_reasons
