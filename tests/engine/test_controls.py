"""Every sampling control, through real ranks, against the plain implementation of its definition."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.local import LocalEngine
from tests.helpers.plain import Floats, log_softmax
from tests.helpers.plain_sampling import Tally, check, seed_of
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS, VOCAB_SIZE, converted, plain_model, prompts
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig

MAX_SEQ_LEN = 128
NUM_TOKENS = 16
SAMPLED = {"temperature": 0.9, "seed": 7}
HOT = {"temperature": 1.5, "seed": 5}
A, THE, FULL_STOP = 261, 265, 426  # of the tokens most often said


class Engine:
    """A rank group, and what has been compared with it."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.total = Tally()

    def answers(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[dict[int, list[int]]]:
        """Runs requests side by side, checks all that they say, and returns it."""
        streams = [Collected(self.client, p, **({"max_new_tokens": NUM_TOKENS} | how)) for p, how in requests]
        tally = Tally()
        for (prompt, _), stream in zip(requests, streams, strict=True):
            stream.wait()
            self._check(prompt, stream, tally)
        assert tally.near_ties <= 0.01 * tally.tokens
        self.total.tokens += tally.tokens
        self.total.near_ties += tally.near_ties
        self.total.smallest = min(self.total.smallest, tally.smallest)
        self.total.logprob_error = max(self.total.logprob_error, tally.logprob_error)
        return [stream.answers for stream in streams]

    def _check(self, prompt: list[int], stream: Collected, tally: Tally) -> None:
        params = stream.params
        assert sorted(stream.answers) == list(range(params.n))
        for index, output in stream.answers.items():
            reason = stream.finish_reasons[index]
            logits = check(
                plain_model(), params, prompt, output, reason, tally, eos_id=EOS, max_seq_len=MAX_SEQ_LEN, index=index
            )
            if index:
                continue
            expected = log_softmax(logits)
            if params.logprobs is None:
                assert not stream.logprobs
                assert not stream.top_logprobs
            else:
                rows = expected[len(prompt) - 1 : len(prompt) - 1 + len(output)]
                assert len(stream.logprobs) == len(output)
                assert len(stream.top_logprobs) == (len(output) if params.logprobs else 0)
                for i, row in enumerate(rows):
                    top = stream.top_logprobs[i] if params.logprobs else []
                    _check_logprobs(row, output[i], stream.logprobs[i], top, params.logprobs, tally)
            if params.prompt_logprobs is None:
                assert stream.prompt_logprobs is None
                continue
            assert stream.prompt_logprobs is not None
            assert len(stream.prompt_logprobs) == len(prompt)
            assert stream.prompt_logprobs[0] is None
            for i, one in enumerate(stream.prompt_logprobs[1:], start=1):
                assert one is not None
                _check_logprobs(expected[i - 1], prompt[i], one.logprob, one.top, params.prompt_logprobs, tally)


def _check_logprobs(
    expected: Floats, token: int, logprob: float, top: list[tuple[int, float]], asked: int, tally: Tally
) -> None:
    said = [(token, logprob), *top]
    error = max(abs(expected[i] - value) for i, value in said)
    tally.logprob_error = max(tally.logprob_error, error)
    assert error < 1e-4
    assert len({i for i, _ in top}) == asked
    values = [value for _, value in top]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(np.sort(expected)[::-1][:asked], abs=1e-4)


@pytest.fixture(scope="module", params=[1, 2])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = EngineConfig(
        standby=False,
        checkpoint_dir=str(converted(tmp_path_factory.mktemp("controls"))),
        tensor_parallel_size=request.param,
        device="cpu",
        max_seq_len=MAX_SEQ_LEN,
        max_num_seqs=64,
        max_num_batched_tokens=192,
        checksum_interval=4,
    )
    client = EngineClient(config)
    client.start()
    engine = Engine(client)
    yield engine
    assert [rank.num_blocks_in_use for rank in client.status().ranks] == [0] * request.param
    client.close()
    print(f"\nTP {request.param}: {engine.total}")  # noqa: T201


# What the control is added to, and the control; it must change some answer, or nothing would be shown.
CONTROLS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "temperature": [({}, {"temperature": t, "seed": 2**64 - 1}) for t in (0.2, 0.7, 1.0, 2.5, 100.0)],
    "seed": [(SAMPLED, {"seed": seed}) for seed in (0, 2**32, 2**63, 2**64 - 1)],
    "top_p": [(SAMPLED, {"top_p": p}) for p in (1e-9, 0.3, 0.8, 0.99)],
    "top_k": [(SAMPLED, {"top_k": k}) for k in (1, 2, 5, 40)] + [({"temperature": 50.0, "seed": 3}, {"top_k": 511})],
    "min_p": [(SAMPLED, {"min_p": p}) for p in (0.02, 0.2, 1.0)],
    "all_filters": [({"temperature": 3.0, "seed": 1}, {"top_p": 0.9, "top_k": 20, "min_p": 0.1})],
    "repetition_penalty": [({}, {"repetition_penalty": r}) for r in (0.7, 1.3, 100.0)]
    + [(SAMPLED, {"repetition_penalty": 1.2})],
    "presence_penalty": [({}, {"presence_penalty": p}) for p in (-1.5, 1.5)] + [(SAMPLED, {"presence_penalty": 1.0})],
    "frequency_penalty": [({}, {"frequency_penalty": p}) for p in (-5.0, 4.0)]
    + [(SAMPLED, {"frequency_penalty": 0.5})],
    "logit_bias": [
        ({}, {"logit_bias": {THE: 3.0, A: -3.0}}),
        ({}, {"logit_bias": {THE: -1e30, A: -1e300, FULL_STOP: -100.0}}),
        (SAMPLED, {"logit_bias": {THE: 100.0}}),
        (SAMPLED, {"logit_bias": dict.fromkeys(range(3, 300), -100.0)}),
        (SAMPLED, {"logit_bias": dict.fromkeys(range(300, 320), 2.5)}),
    ],
    "stop_token_ids": [
        ({}, {"stop_token_ids": (FULL_STOP, THE)}),
        (SAMPLED, {"stop_token_ids": tuple(range(260, 300))}),
    ],
    "min_tokens": [
        ({"stop_token_ids": (THE, A)}, {"min_tokens": 12}),
        ({"logit_bias": {EOS: 26.0}}, {"min_tokens": 7}),
        ({"logit_bias": {EOS: 26.0}} | SAMPLED, {"min_tokens": NUM_TOKENS}),
    ],
    "ignore_eos": [
        ({"logit_bias": {EOS: 24.0}} | SAMPLED, {"ignore_eos": True}),
        ({"logit_bias": {EOS: 26.0}}, {"ignore_eos": True}),
    ],
    "top_p_decay": [
        (HOT, {"top_p_decay": 0.8}),
        (HOT | {"top_p": 0.95}, {"top_p_decay": 0.8}),
        (HOT | {"top_p": 0.95, "top_p_decay": 0.5}, {"top_p_min": 0.6}),
        (HOT | {"top_p": 0.99, "top_p_decay": 0.5}, {"top_p_reset_ids": tuple(range(400, 460))}),
        (HOT | {"top_p": 0.5, "top_p_decay": 0.9}, {"top_p_min": 0.9}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("control", CONTROLS)
def test_each_control_is_what_it_is_defined_to_be(engine: Engine, control: str) -> None:
    some = prompts(3, seed=1, longest=30)
    ways: list[dict[str, Any]] = []
    for base, change in CONTROLS[control]:
        ways += [how for how in (base, base | change) if how not in ways]
    answers = engine.answers([(p, how) for how in ways for p in some])
    of = [answers[i : i + len(some)] for i in range(0, len(answers), len(some))]
    for base, change in CONTROLS[control]:
        assert of[ways.index(base)] != of[ways.index(base | change)], f"{change} changes nothing"


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_are_never_completed(engine: Engine, length: int, how: dict[str, Any]) -> None:
    some = prompts(6, seed=2, longest=30)
    first = engine.answers([(p, how) for p in some])
    # What each of them says without is what it must not say: at the answer's beginning (which ends a sequence that
    # begins in the prompt), in its middle, and at the end.
    said = [[*p, *answer[0]] for p, answer in zip(some, first, strict=True)]
    words = [
        tuple(tuple(text[end - length : end]) for end in (len(p) + 1, len(p) + 7, len(text)) if end >= length)
        for p, text in zip(some, said, strict=True)
    ]
    second = engine.answers([(p, how | {"bad_words": w}) for p, w in zip(some, words, strict=True)])
    for prompt, answer, word in zip(some, second, words, strict=True):
        text = [*prompt, *answer[0]]
        for end in range(len(prompt) + 1, len(text) + 1):
            assert tuple(text[:end][-length:]) not in word
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_log_probabilities_of_answers_and_prompts(engine: Engine) -> None:
    ways: list[dict[str, Any]] = [
        {"logprobs": 0},
        {"logprobs": 5},
        {"logprobs": 20, "prompt_logprobs": 0} | SAMPLED,
        {"prompt_logprobs": 3, "temperature": 2.0, "top_k": 50, "seed": 1},
        # They are of the network's distribution, whatever is done to it.
        {"logprobs": 2, "prompt_logprobs": 20, "logit_bias": {THE: 50.0}, "top_k": 9, "bad_words": ((A,),)},
    ]  # fmt: skip
    # One prompt is longer than a step's tokens, so that its log-probabilities come in pieces; and two are the same.
    some = [*prompts(3, seed=3), prompts(1, seed=3)[0], (prompts(1, seed=4, longest=60)[0] * 99)[:100]]
    engine.answers([(p, how) for p in some for how in ways])


def test_each_answer_has_a_seed_of_its_own(engine: Engine) -> None:
    requests = [
        (p, SAMPLED | {"n": 4, "seed": 2**63 + i, "logprobs": 1}) for i, p in enumerate(prompts(5, seed=5, longest=40))
    ]
    answers = engine.answers(requests)
    assert all(len({tuple(ids) for ids in answer.values()}) > 1 for answer in answers)
    # The others are what their seeds alone would say.
    again = engine.answers([(p, how | {"n": 1, "seed": seed_of(how["seed"], 2)}) for p, how in requests])
    assert [answer[0] for answer in again] == [answer[2] for answer in answers]


def mixture(rng: random.Random) -> dict[str, Any]:
    """Controls at random, each with probability 0.4."""
    ids = [rng.randrange(259, VOCAB_SIZE) for _ in range(40)]
    choices: dict[str, Any] = {
        "temperature": rng.choice([0.3, 0.8, 1.0, 1.7]),
        "top_p": rng.choice([0.2, 0.7, 0.95]),
        "top_k": rng.choice([1, 3, 30, 200]),
        "min_p": rng.choice([0.01, 0.1, 0.5]),
        "repetition_penalty": rng.choice([0.9, 1.1, 1.6]),
        "presence_penalty": rng.choice([-0.7, 0.4, 2.0]),
        "frequency_penalty": rng.choice([-0.3, 0.2, 1.1]),
        "logit_bias": {i: rng.uniform(-5, 5) for i in ids[:10]} | {EOS: rng.uniform(10, 26), THE: -100.0},
        "bad_words": tuple(tuple(rng.choices(range(259, 430), k=k)) for k in (1, 1, 2, 2, 3))
        + tuple((a, b) for a in (A, THE, 263) for b in range(400, 420)),
        "stop_token_ids": tuple(ids[10:14]),
        "min_tokens": rng.randint(1, NUM_TOKENS),
        "ignore_eos": True,
        "logprobs": rng.choice([0, 1, 20]),
        "prompt_logprobs": rng.choice([0, 2]),
        "n": rng.choice([1, 2]),
    }
    chosen = {name: value for name, value in choices.items() if rng.random() < 0.4}
    if rng.random() < 0.3:
        chosen |= {"top_p": 0.95, "top_p_decay": rng.choice([0.7, 0.9]), "top_p_min": rng.choice([0.0, 0.4])}
        chosen["top_p_reset_ids"] = tuple(range(400, 460))
    return chosen | {"seed": rng.getrandbits(64), "max_new_tokens": rng.randint(NUM_TOKENS, 2 * NUM_TOKENS)}


def test_any_controls_side_by_side(engine: Engine) -> None:
    rng = random.Random(6)
    answers = engine.answers([(p, mixture(rng)) for p in prompts(36, seed=6, longest=90)])
    assert len({tuple(answer[0]) for answer in answers}) > 30


def test_a_bias_beyond_float32_draws_no_warning(tmp_path: Path) -> None:
    # Of this process: its warnings are errors. A rank's would stand in its users' logs, once for whoever asks.
    engine = LocalEngine(EngineConfig(checkpoint_dir=str(converted(tmp_path)), device="cpu", max_seq_len=MAX_SEQ_LEN))
    streams = [
        Collected(engine, [1, 5], max_new_tokens=3, logit_bias={A: 1e300, THE: -1e300}, **how)  # type: ignore[arg-type]
        for how in ({}, SAMPLED)
    ]
    engine.run()
    assert [stream.ids for stream in streams] == [[A] * 3] * 2
