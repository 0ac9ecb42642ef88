"""Guessing changes no token: with drafts and without, every way of choosing tokens says the same, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS, converted, prompts
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig

SAMPLED = {"temperature": 0.8, "seed": 3}
# Makes any model repeat itself: few tokens are left.
PARROT = {"logit_bias": dict.fromkeys((261, 265, 426), 30.0)}

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "filters": SAMPLED | {"top_p": 0.9, "top_k": 30, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": -0.4},
    "penalties, sampled": SAMPLED | {"repetition_penalty": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "bad words": {"bad_words": ((432,), (267, 265), (426, 261), (265, 265, 265), (261, 426, 265))},
    "bad words, sampled": SAMPLED | PARROT | {"bad_words": ((261, 265), (265, 261, 261))},
    "logit_bias": PARROT,
    "logit_bias, sampled": SAMPLED | PARROT,
    "stop tokens": {"stop_token_ids": (426,)},
    "stop tokens, sampled": SAMPLED | PARROT | {"logit_bias": PARROT["logit_bias"] | {EOS: 45.0}},
    "min_tokens": {"stop_token_ids": (426, 432, 267), "min_tokens": 13},
    "min_tokens, sampled": SAMPLED | {"stop_token_ids": tuple(range(400, 440)), "min_tokens": 7},
    "log-probabilities": {"logprobs": 3, "prompt_logprobs": 1},
    "log-probabilities, sampled": SAMPLED | PARROT | {"logprobs": 0},
    "decaying top_p": SAMPLED | {"top_p": 0.95, "top_p_decay": 0.8, "top_p_min": 0.2, "top_p_reset_ids": (426, 265)},
    "answers": SAMPLED | PARROT | {"n": 2, "logprobs": 1},
}


def repetitive() -> list[list[int]]:
    """Prompts that say the same over and over, a different part of it last."""
    return [(prompt[:9] * 9)[: 50 + i] for i, prompt in enumerate(prompts(3, seed=12))]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(converted(tmp_path_factory.mktemp("speculation"))),
        device="cpu",
        max_seq_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        checksum_interval=4,
        standby=False,
    )


@pytest.fixture(scope="module")
def without(config: EngineConfig) -> LocalEngine:
    return LocalEngine(config)


@pytest.fixture(scope="module")
def guessing(config: EngineConfig) -> LocalEngine:
    return LocalEngine(with_(config, num_speculative_tokens=4))


def answers(engine: Any, some: list[list[int]], how: dict[str, Any]) -> list[Collected]:
    streams = [Collected(engine, p, **({"max_new_tokens": 30 + 3 * i} | how)) for i, p in enumerate(some)]
    if isinstance(engine, LocalEngine):
        engine.run()
    for stream in streams:
        stream.wait()
    return streams


def assert_same(one: Collected, other: Collected) -> None:
    assert one.answers == other.answers
    assert one.finish_reasons == other.finish_reasons
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert len(one.top_logprobs) == len(other.top_logprobs)
    for mine, others in zip(one.top_logprobs, other.top_logprobs, strict=True):
        assert [value for _, value in mine] == pytest.approx([value for _, value in others], abs=1e-4)
        assert dict(mine) == pytest.approx(dict(others), abs=1e-4)
    assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)


@pytest.mark.parametrize("way", WAYS)
def test_drafts_change_no_token(without: LocalEngine, guessing: LocalEngine, way: str) -> None:
    scheduler = guessing.core.scheduler
    for some in (repetitive(), prompts(5, seed=13)):
        drafts, accepted = scheduler.num_draft_tokens, scheduler.num_accepted_tokens
        expected = answers(without, some, WAYS[way])
        for one, other in zip(answers(guessing, some, WAYS[way]), expected, strict=True):
            assert_same(one, other)
        if some != repetitive():
            continue
        if "top_p_decay" in WAYS[way]:  # its top_p depends on the tokens between: there is nothing to guess
            assert scheduler.num_draft_tokens == drafts
        else:
            assert scheduler.num_accepted_tokens > accepted
            # Wrong guesses are what may do harm, and a test without them would show little.
            assert scheduler.num_draft_tokens - drafts > scheduler.num_accepted_tokens - accepted


@pytest.mark.parametrize("changes", [
    {"num_speculative_tokens": 1, "prompt_lookup_min": 1, "prompt_lookup_max": 1},
    {"num_speculative_tokens": 16, "prompt_lookup_min": 1},
    {"num_speculative_tokens": 4, "num_kv_blocks": 40, "block_size": 4},
    {"num_speculative_tokens": 4, "max_num_batched_tokens": 9, "max_num_seqs": 9, "enable_prefix_caching": True},
])  # fmt: skip
def test_drafts_of_any_length_and_where_room_is_short(
    config: EngineConfig, without: LocalEngine, changes: dict[str, Any]
) -> None:
    some, engine = repetitive() + prompts(5, seed=13), LocalEngine(with_(config, **changes))
    for how in ({}, SAMPLED | {"presence_penalty": 0.1, "stop_token_ids": (438,)}, PARROT | SAMPLED):
        for one, other in zip(answers(engine, some, how), answers(without, some, how), strict=True):
            assert_same(one, other)
    assert engine.core.scheduler.num_accepted_tokens > 0
    assert (engine.core.scheduler.residency.num_preemptions > 0) == ("num_kv_blocks" in changes)


def test_guesses_save_steps(without: LocalEngine, guessing: LocalEngine) -> None:
    def steps(engine: LocalEngine) -> int:
        before = engine.num_steps
        assert len(answers(engine, repetitive()[:1], PARROT | {"max_new_tokens": 60})[0].ids) == 60
        return engine.num_steps - before

    assert steps(without) >= 60
    assert steps(guessing) < 40


def test_two_ranks_guess_alike(config: EngineConfig, without: LocalEngine) -> None:
    client = EngineClient(with_(config, num_speculative_tokens=4, tensor_parallel_size=2))
    client.start()
    try:
        client.status()
        first = client.status().ranks[0].step
        one = answers(client, repetitive()[:1], PARROT | {"max_new_tokens": 60})[0]
        status = client.status()
        assert one.ids == answers(without, repetitive()[:1], PARROT | {"max_new_tokens": 60})[0].ids
        assert status.ranks[0].step - first < 40, "sixty tokens"
        requests = [(p, how) for how in WAYS.values() for p in (*repetitive()[:2], *prompts(2, seed=13))]
        expected = [Collected(without, p, **how, max_new_tokens=30) for p, how in requests]  # type: ignore[arg-type]
        without.run()
        streams = [Collected(client, p, **how, max_new_tokens=30) for p, how in requests]
        for mine, other in zip(streams, expected, strict=True):
            mine.wait()
            assert_same(mine, other)
        status = client.status()
        assert len({rank.checksum for rank in status.ranks}) == 1
        assert {rank.num_blocks_in_use for rank in status.ranks} == {0}
        heartbeat = client.heartbeat
        while heartbeat is None or heartbeat.step < status.ranks[0].step:  # once a second
            client.status()
            heartbeat = client.heartbeat
        assert 0 < heartbeat.num_accepted_tokens < heartbeat.num_draft_tokens
    finally:
        client.close()
