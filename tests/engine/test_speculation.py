"""Guessing changes no token: with drafts and without, every way of choosing tokens says the same, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.ways import PARROT, SAMPLED, WAYS, answers, assert_same
from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.stories import converted, prompts
from tpserve.bench.streams import settled_heartbeat
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig


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
        heartbeat = settled_heartbeat(client)
        assert 0 < heartbeat.num_accepted_tokens < heartbeat.num_draft_tokens
    finally:
        client.close()
