"""The engine under load: nothing is lost, nothing is left behind, and nobody notices who else is there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.helpers.data import shared_data
from tpserve.bench import engine_trace, prefix_cache
from tpserve.bench.serve_arrivals import read_trace
from tpserve.bench.streams import Stream, engine, settled_heartbeat
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.sampling_params import SamplingParams

VOCAB_SIZE = 200
MAX_NUM_SEQS = 64


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> EngineConfig:
    """Room for 1,024 tokens, which 64 sequences outgrow."""
    return EngineConfig(
        checkpoint_dir=str(tiny_checkpoint),
        tensor_parallel_size=2,
        device="cpu",
        max_seq_len=512,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=256,
        max_num_waiting=1000,
        block_size=4,
        num_kv_blocks=256,
        step_timeout_s=30,
        standby=False,  # nobody dies here
    )


@pytest.fixture(scope="module")
def group(config: EngineConfig) -> Iterator[EngineClient]:
    """Two ranks, shared by the tests of this module, and alive after each."""
    with engine(config) as client:
        yield client
        assert client.num_restarts == 0


@pytest.fixture(scope="module")
def uncached(config: EngineConfig) -> Iterator[EngineClient]:
    """The same without the prefix cache."""
    with engine(msgspec.structs.replace(config, enable_prefix_caching=False)) as client:
        yield client


def stream(name: str, num_tokens: int, on_tokens: Callable[[Stream], None] | None = None, **how: Any) -> Stream:
    """A request with a prompt of its own: the same name asks the same."""
    rng = random.Random(name)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 24))]
    return Stream(name, prompt, SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, **how), on_tokens)


def blocks_in_use(client: EngineClient) -> list[int]:
    """Of every rank, after the one next step."""
    return [rank.num_blocks_in_use for rank in client.status().ranks]


@pytest.mark.slow
def test_a_thousand_requests_of_a_real_trace_on_too_small_a_cache(group: EngineClient) -> None:
    trace = shared_data("traces") / "AzureLLMInferenceTrace_conv.csv"
    arrivals = read_trace(trace, 1000, shrink_prompts=64, shrink_outputs=10, max_seq_len=512)
    streams = engine_trace.streams_of(arrivals, VOCAB_SIZE, seed=1)
    before = settled_heartbeat(group).num_preemptions
    engine_trace.replay(group, streams, arrivals, squeeze=arrivals[-1].at_s / 10)
    assert not any(engine_trace.faults(group, streams).values()), engine_trace.faults(group, streams)
    assert settled_heartbeat(group).num_preemptions > before
    assert engine_trace.differences_alone(group, random.Random(2).sample(streams, 10)) == 0


def test_clients_that_vanish_leave_nothing_one_step_after_it_is_noticed(group: EngineClient) -> None:
    how: dict[str, Any] = {"temperature": 0.7, "seed": 9}
    alone = stream("stays", 60, **how).submit(group).wait()
    rng = random.Random(4)
    leaves_after = {f"vanishing-{i}": rng.randrange(1, 40) for i in range(200)}
    left = threading.Semaphore(0)

    def leave(one: Stream) -> None:
        if len(one.token_ids) == leaves_after[one.request_id]:
            group.cancel(one.request_id)
            left.release()

    stays = stream("stays", 60, **how)
    everyone = [stream(name, 400, leave, temperature=0.5 * (i % 2), seed=i) for i, name in enumerate(leaves_after)]
    for one in (*everyone[:30], stays, *everyone[30:]):
        one.submit(group)
    for _ in range(80):  # these leave by themselves, in the middle of a step; others run or wait
        assert left.acquire(timeout=60)
    assert stays.wait() == alone
    for one in everyone:
        group.cancel(one.request_id)
    # The question stands behind the cancellations, and is answered after one and the same step by all ranks.
    assert blocks_in_use(group) == [0, 0]
    assert all(len(one.token_ids) <= leaves_after[one.request_id] for one in everyone)
    assert all(one.finish_reason is None for one in everyone)
    assert stream("stays", 60, **how).submit(group).wait() == alone


def test_deadlines_behind_a_long_queue_are_kept(group: EngineClient) -> None:
    queue = [stream(f"queue-{i}", 450).submit(group) for i in range(2 * MAX_NUM_SEQS)]
    queue[0].wait_begun()
    late = [stream(f"late-{i}", 5).submit(group, timeout_s=0.3) for i in range(50)]
    for one in late:
        assert one.wait() == []
        assert one.finish_reason == "timeout"
        assert 0.3 <= one.end_to_end_s < 0.5
    for one in queue:
        group.cancel(one.request_id)
    assert blocks_in_use(group) == [0, 0]


@pytest.mark.parametrize("way", prefix_cache.WAYS)
def test_a_shared_prefix_is_computed_once(way: str, group: EngineClient, uncached: EngineClient) -> None:
    prefix_tokens, block_size = 300, group.info.block_size
    prompts = prefix_cache.prompts_with_prefix(64, prefix_tokens, 7, VOCAB_SIZE, seed=len(way))
    cached, computed = (prefix_cache.run_round(client, prompts, 3, way) for client in (group, uncached))
    assert cached.answers == computed.answers
    assert prefix_cache.times_computed(cached.num_computed_tokens, prompts, prefix_tokens, block_size) == 1
    assert prefix_cache.times_computed(computed.num_computed_tokens, prompts, prefix_tokens, block_size) == 64
    assert cached.num_computed_heard == cached.num_computed_tokens
    assert blocks_in_use(group) == [0, 0]
