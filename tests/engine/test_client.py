"""The engine over two real ranks: what users of one request see whatever the others do."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import pytest

from tests.helpers.requests import Collected
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, OverloadedError, RequestError
from tpserve.engine.in_flight import NewRequest
from tpserve.engine.protocol import RequestOutput
from tpserve.engine.sampling_params import SamplingParams

rng = random.Random(11)
PROMPTS = [[rng.randrange(3, 200) for _ in range(rng.randrange(1, 90))] for _ in range(32)]


def params(i: int) -> dict[str, Any]:
    """Lengths and ways of sampling that differ from request to request."""
    how: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": i},
        {"temperature": 1.2, "top_p": 0.7, "seed": 2**64 - 1 - i},
        {"temperature": 1.0, "top_k": 5, "seed": i, "logprobs": 0},
    ]
    return {"max_new_tokens": 5 + i % 20, "ignore_eos": True} | how[i % 4]


def assert_idle(client: EngineClient) -> None:
    status = client.status()
    assert [r.rank for r in status.ranks] == [0, 1]
    assert [r.num_blocks_in_use for r in status.ranks] == [0, 0]
    assert len({r.checksum for r in status.ranks}) == 1


def test_32_streams_of_different_lengths_equal_their_solo_runs(client: EngineClient) -> None:
    solo = [Collected(client, p, **params(i)).wait() for i, p in enumerate(PROMPTS)]
    assert [len(ids) for ids in solo] == [params(i)["max_new_tokens"] for i in range(32)]
    together = [Collected(client, p, **params(i)) for i, p in enumerate(PROMPTS)]
    for i, stream in enumerate(together):
        assert stream.wait() == solo[i], i
        assert stream.finish_reason == "length"
        assert len(stream.logprobs) == (len(stream.ids) if i % 4 == 3 else 0)
    assert_idle(client)
    assert client.heartbeat is not None
    assert client.heartbeat.num_preemptions == 0


def test_tokens_stream_one_by_one_and_requests_join_a_running_batch(client: EngineClient) -> None:
    long = Collected(client, [5], max_new_tokens=150, ignore_eos=True)
    long.wait_tokens(20)
    late = Collected(client, [6], max_new_tokens=10, ignore_eos=True)
    late.wait()
    assert len(long.ids) < 150, "the later request waited for the earlier one's end"
    long.wait()
    assert long.num_outputs == 150
    assert_idle(client)


def test_cancelled_requests_give_their_blocks_back(client: EngineClient) -> None:
    streams = [Collected(client, p, max_new_tokens=200, ignore_eos=True) for p in PROMPTS[:6]]
    streams[0].wait_tokens(3)
    for stream in streams:
        client.cancel(stream.request_id)
    client.cancel("never seen")
    counts = [len(stream.ids) for stream in streams]
    assert_idle(client)
    time.sleep(0.1)
    assert [len(stream.ids) for stream in streams] == counts
    assert all(stream.finish_reason is None for stream in streams)


def test_answers_of_one_request(client: EngineClient) -> None:
    how = {"max_new_tokens": 30, "ignore_eos": True, "temperature": 1.0, "seed": 5, "logprobs": 1}
    alone = Collected(client, PROMPTS[3], **how).wait()
    together = Collected(client, PROMPTS[3], **how, n=3)
    assert together.wait() == alone  # answer 0 has the request's seed
    assert sorted(together.answers) == [0, 1, 2]
    assert len({tuple(ids) for ids in together.answers.values()}) == 3
    assert together.finish_reasons == {0: "length", 1: "length", 2: "length"}
    again = Collected(client, PROMPTS[3], **how, n=3)
    assert (again.wait(), again.answers) == (alone, together.answers)
    assert_idle(client)


def test_one_answer_can_be_cancelled(client: EngineClient) -> None:
    stream = Collected(client, [5, 6], max_new_tokens=150, ignore_eos=True, temperature=1.0, n=2)
    stream.wait_tokens(5)
    client.cancel(stream.request_id, 1)
    stream.wait_tokens(150)
    assert len(stream.answers[1]) < 150
    assert stream.finish_reasons == {0: "length"}
    assert_idle(client)


def test_a_deadline_frees_the_blocks(client: EngineClient) -> None:
    stream = Collected(client, [5, 6], max_new_tokens=240, ignore_eos=True, timeout_s=0.05)
    assert len(stream.wait()) < 240
    assert stream.finish_reason == "timeout"
    assert_idle(client)


def test_a_trace_of_every_rank(client: EngineClient) -> None:
    stream = Collected(client, [5, 6], max_new_tokens=200, ignore_eos=True)
    traces = client.trace(10)
    client.cancel(stream.request_id)
    assert [trace.rank for trace in traces] == [0, 1]
    assert all(span.rank == trace.rank and span.duration_ns >= 0 for trace in traces for span in trace.spans)
    assert all(trace.spans for trace in traces)
    assert_idle(client)


def test_what_prometheus_is_told(client: EngineClient) -> None:
    Collected(client, PROMPTS[4], max_new_tokens=20, ignore_eos=True).wait()
    text = client.metrics.text().decode()
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counts["tpserve:generation_tokens_total"] >= 20
    assert counts["tpserve:time_to_first_token_seconds_count"] >= 1
    assert counts["tpserve:request_queue_time_seconds_count"] >= 1
    assert counts['tpserve:request_success_total{finished_reason="length"}'] >= 1


def test_stop_tokens_end_a_request_and_are_withheld(client: EngineClient) -> None:
    ids = Collected(client, [9, 8, 7], max_new_tokens=20, ignore_eos=True).wait()
    stop = ids[10]
    first = ids.index(stop)
    stopped = Collected(client, [9, 8, 7], max_new_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    assert stopped.wait() == ids[:first]
    assert stopped.finish_reason == "stop"


def test_the_context_ends_a_request(client: EngineClient, tiny_config: EngineConfig) -> None:
    prompt = [3] * (tiny_config.max_seq_len - 4)
    full = Collected(client, prompt, max_new_tokens=100, ignore_eos=True)
    assert len(full.wait()) == 4
    assert full.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "changes", "field"),
    [
        ([], {}, "prompt_token_ids"),
        ([1] * 256, {}, "prompt_token_ids"),
        ([200], {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"seed": 2**64}, "seed"),
    ],
)
def test_bad_requests_are_refused_with_their_field(
    client: EngineClient, prompt: list[int], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError) as e:
        client.submit("bad", prompt, SamplingParams(**changes), print)
    assert e.value.field == field
    assert e.value.status == 400


def test_a_full_queue_answers_429(client: EngineClient, tiny_config: EngineConfig) -> None:
    limit = tiny_config.max_num_seqs + tiny_config.max_num_waiting
    streams = [Collected(client, [i + 3], max_new_tokens=200, ignore_eos=True) for i in range(limit)]
    with pytest.raises(OverloadedError) as e:
        client.submit("one more", [3], SamplingParams(), print)
    assert e.value.status == 429
    assert e.value.retry_after_s >= 1
    for stream in streams:
        client.cancel(stream.request_id)
    assert_idle(client)


def test_of_requests_together_all_are_taken_or_none(client: EngineClient, tiny_config: EngineConfig) -> None:
    good = NewRequest("good", [3], SamplingParams(max_new_tokens=1), _nobody)
    limit = tiny_config.max_num_seqs + tiny_config.max_num_waiting
    for field, others in {
        "temperature": [good._replace(request_id="bad", params=SamplingParams(temperature=-1.0))],
        "prompt_token_ids": [good._replace(request_id="bad", prompt_token_ids=[])],
        "request_id": [good],
    }.items():
        with pytest.raises(RequestError) as refused:
            client.submit_together([good, *others])
        assert refused.value.field == field
    with pytest.raises(OverloadedError, match=f"{limit} are admitted, {limit + 1} more"):
        client.submit_together([good._replace(request_id=str(i)) for i in range(limit + 1)])
    client.submit_together([])
    assert Collected(client, [3], max_new_tokens=1, ignore_eos=True).wait()
    assert_idle(client)


def _nobody(output: RequestOutput) -> None:
    raise AssertionError(output)


def test_preempted_requests_say_the_same(tiny_config: EngineConfig, client: EngineClient) -> None:
    requests = [(p[:20], params(i) | {"max_new_tokens": 45}) for i, p in enumerate(PROMPTS[:8])]
    solo = [Collected(client, p, **how).wait() for p, how in requests]
    # 256 tokens in all: one sequence of full length fits, eight of these do not.
    small = EngineClient(msgspec.structs.replace(tiny_config, num_kv_blocks=16))
    try:
        assert small.start().num_blocks == 16
        streams = [Collected(small, p, **how) for p, how in requests]
        assert [stream.wait() for stream in streams] == solo
        assert_idle(small)
        deadline_s = time.monotonic() + 5  # heartbeats come once a second
        while (small.heartbeat is None or not small.heartbeat.num_preemptions) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert small.heartbeat is not None
        assert small.heartbeat.num_preemptions > 0
    finally:
        small.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_parallel_size": 5}, "possible sizes: 1 to 4"),
        ({"num_kv_blocks": 3}, "needs 16"),
        ({"device": "cuda", "tensor_parallel_size": 1}, "GPU"),
    ],
)
def test_a_configuration_that_cannot_be_served(tiny_config: EngineConfig, change: dict[str, Any], message: str) -> None:
    import torch

    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    client = EngineClient(msgspec.structs.replace(tiny_config, **change))
    with pytest.raises(ConfigError, match=message):
        client.start()
    assert client.failure is not None
    assert client.num_restarts == 0
    assert not client.pids


def test_a_folder_that_is_no_checkpoint(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.json"):
        EngineClient(EngineConfig(checkpoint_dir=str(tmp_path)))
