"""A request's tokens depend on its prompt, its parameters and the weights, on nothing that happens around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.groups import with_
from tests.helpers.local import LocalEngine
from tests.helpers.plain_sampling import Tally, check, decide
from tests.helpers.requests import Collected
from tests.helpers.stories import EOS, converted, plain_model, prompts
from tpserve.bench.streams import settled_heartbeat
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig

MAX_SEQ_LEN = 160
SAMPLED = {"temperature": 0.9, "top_p": 0.95}
# Its state is not in the tokens' positions alone: whoever goes on after a preemption must find it again.
DECAY = {"temperature": 1.5, "top_p": 0.95, "top_p_decay": 0.7, "top_p_reset_ids": tuple(range(400, 460))}

Request = tuple[list[int], dict[str, Any]]
REQUESTS: list[Request] = []  # filled by `config`: their prompts are in the shared data
# bfloat16 has 8 bits: logits from 8 to 16 are multiples of 1/16, and five layers have rounded before.
BF16_MARGIN = 3 / 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    ways: list[dict[str, Any]] = [{}, SAMPLED, {"repetition_penalty": 1.2, "bad_words": ((261, 265), (426, 13))}, DECAY]
    REQUESTS[:] = [
        (prompt, {"max_new_tokens": 6 + 11 * (i % 5), "seed": 100 + i} | ways[i % 4])
        for i, prompt in enumerate(prompts(12, seed=8, longest=90))
    ]
    return EngineConfig(
        checkpoint_dir=str(converted(tmp_path_factory.mktemp("reproducible"))),
        device="cpu",
        max_seq_len=MAX_SEQ_LEN,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        standby=False,
    )


def run(engine: LocalEngine, requests: list[Request], **more: Any) -> list[Collected]:
    streams = [Collected(engine, prompt, **how, **more) for prompt, how in requests]  # type: ignore[arg-type]
    engine.run()
    return streams


def solo(config: EngineConfig) -> list[list[int]]:
    """What each request gets alone, on an engine where nobody was before it."""
    engine = LocalEngine(with_(config, enable_prefix_caching=False))
    return [run(engine, [request])[0].ids for request in REQUESTS]


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> list[list[int]]:
    answers, tally = solo(config), Tally()
    for (prompt, how), ids in zip(REQUESTS, answers, strict=True):
        params = Collected(_Nobody(), prompt, **how).params  # type: ignore[arg-type]
        reason = "length" if len(ids) == params.max_new_tokens else "stop"
        check(plain_model(), params, prompt, ids, reason, tally, eos_id=EOS, max_seq_len=MAX_SEQ_LEN)
    assert tally.near_ties == 0
    assert tally.smallest > 1e-5, "these requests do not tell a defect from rounding: choose other seeds"
    return answers


class _Nobody:
    def submit(self, *args: Any, **more: Any) -> None:
        """Takes a request and never answers."""


def strangers(engine: LocalEngine) -> None:
    """Others, with prompts that share the beginning of some of the requests', and with every kind of work."""
    ways: list[dict[str, Any]] = [
        {"temperature": 1.3, "seed": 1, "n": 2}, {"beam_width": 3}, {"logprobs": 5, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "bad_words": ((261,), (265, 280))},
    ]  # fmt: skip
    for i, (prompt, _) in enumerate(REQUESTS[:8]):
        stranger = [*prompt[: len(prompt) // 2], 300 + i, 5]
        Collected(engine, stranger, max_new_tokens=25, **ways[i % 4])  # type: ignore[arg-type]


SITUATIONS: dict[str, dict[str, Any]] = {
    "side by side": {},
    "nothing cached": {"enable_prefix_caching": False},
    "a step at a time": {"async_scheduling": False},
    "prompts in one piece": {"enable_chunked_prefill": False},
    "prompts in small pieces": {"max_num_batched_tokens": 13, "max_num_seqs": 13},
    "blocks of one token": {"block_size": 1},
    "drafts": {"num_speculative_tokens": 3},
    "preempted": {"num_kv_blocks": 24, "block_size": 8},
    "preempted, a step at a time": {"num_kv_blocks": 24, "block_size": 8, "async_scheduling": False},
    "preempted, nothing cached, small pieces": {
        "num_kv_blocks": 40, "block_size": 4, "enable_prefix_caching": False, "max_num_batched_tokens": 17,
        "max_num_seqs": 17,
    },
    "preempted, drafts, small pieces": {
        "num_kv_blocks": 40, "block_size": 4, "num_speculative_tokens": 4, "max_num_batched_tokens": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_request_says_the_same_in_every_situation(
    config: EngineConfig, alone: list[list[int]], situation: str
) -> None:
    engine = LocalEngine(with_(config, **SITUATIONS[situation]))
    strangers(engine)
    assert [stream.ids for stream in run(engine, REQUESTS)] == alone
    assert (engine.core.scheduler.residency.num_preemptions > 0) == ("preempted" in situation)
    if SITUATIONS[situation].get("num_speculative_tokens"):
        assert engine.core.scheduler.num_accepted_tokens > 0
    # Once more, now that the cache holds what it can of it; in another order, and entering a step apart.
    again = []
    for request in reversed(REQUESTS):
        again.append(Collected(engine, request[0], **request[1]))  # type: ignore[arg-type]
        engine.step()
    engine.run()
    assert [stream.ids for stream in reversed(again)] == alone
    cached = [stream.num_cached_tokens for stream in again]
    if "nothing cached" in situation:
        assert not any(cached)
    elif "preempted" not in situation:
        size = engine.config.block_size
        assert cached[::-1] == [(len(prompt) - 1) // size * size for prompt, _ in REQUESTS]


def test_an_answer_that_extends_a_cached_answer(config: EngineConfig, alone: list[list[int]]) -> None:
    # As in a conversation: the next prompt is the last one, its answer, and something new.
    engine = LocalEngine(with_(config, block_size=4))
    longer = [([*prompt, *ids, 13], how) for (prompt, how), ids in zip(REQUESTS, alone, strict=True)]
    expected = [run(LocalEngine(config), [request])[0].ids for request in longer]
    run(engine, REQUESTS)
    streams = run(engine, longer)
    assert [stream.ids for stream in streams] == expected
    for stream, (prompt, _), ids in zip(streams, REQUESTS, alone, strict=True):
        # The answer's last token was never computed.
        assert stream.num_cached_tokens >= (len(prompt) + len(ids) - 1) // 4 * 4


def on_real_ranks(config: EngineConfig) -> tuple[list[list[int]], int]:
    """All requests together on a rank group, twice, so that the cache has its part; and the preemptions."""
    client = EngineClient(config)
    client.start()
    try:
        answers = []
        for _ in range(2):
            streams = [Collected(client, prompt, **how) for prompt, how in REQUESTS]
            answers += [stream.wait() for stream in streams]
        status = client.status()
        assert [rank.num_blocks_in_use for rank in status.ranks] == [0] * config.tensor_parallel_size
        return answers, settled_heartbeat(client).num_preemptions
    finally:
        client.close()


HARD = {"num_kv_blocks": 48, "block_size": 4, "max_num_batched_tokens": 40, "checksum_interval": 1}


def test_two_ranks_say_what_one_says(config: EngineConfig, alone: list[list[int]]) -> None:
    answers, num_preemptions = on_real_ranks(with_(config, tensor_parallel_size=2, **HARD))
    assert answers == alone * 2
    assert num_preemptions > 0


def test_bfloat16_differs_only_where_logits_are_nearer_than_rounding(config: EngineConfig) -> None:
    half = with_(config, dtype="bfloat16")
    expected = solo(half)
    found = {}
    for situation, changes in list(SITUATIONS.items())[::2]:
        engine = LocalEngine(with_(half, **changes))
        strangers(engine)
        found[situation] = [stream.ids for stream in run(engine, REQUESTS)]
    model = plain_model(torch.bfloat16)
    margins, places = [], set()
    for situation, answers in found.items():
        for (prompt, how), one, other in zip(REQUESTS, expected, answers, strict=True):
            if one == other:
                continue
            place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            assert place is not None, (situation, one, other)  # none of them ends early
            params = Collected(_Nobody(), prompt, **how).params  # type: ignore[arg-type]
            logits = model.logits(prompt + one[:place])[-1]
            margins.append(decide(logits, params, prompt, one[:place], params.seed or 0, EOS).margin)
            assert margins[-1] < BF16_MARGIN, (situation, prompt, how, place)
            places.add((*prompt, *one[:place]))
    num_answers, num_tokens = len(found) * len(REQUESTS), len(found) * sum(map(len, expected))
    said = f"{len(margins)} of {num_answers} answers ({num_tokens} tokens) turn, at {len(places)} different places"
    print(f"\nbfloat16: {said}; largest margin there: {max(margins, default=0):.4f}")  # noqa: T201
    assert len(margins) < 0.02 * num_tokens
