"""The client over a rank group that does what a test tells it to: choices, deadlines, replays, overload."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_group import FakeGroup, Heard, out, until
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import EngineError, OverloadedError, RequestError
from tpserve.engine.in_flight import Request, Requests
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import (
    Add,
    Cancel,
    Choice,
    Heartbeat,
    Outputs,
    RankTrace,
    RequestOutput,
    Trace,
)
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.suspects import Suspects
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineClient]:
    FakeGroup.all = []
    monkeypatch.setattr("tpserve.engine.standby.RankGroup", FakeGroup)
    CheckpointInfo(ModelArgs(32, 2, 4, 2, 90, 88), "float32").write(tmp_path)
    client = EngineClient(
        EngineConfig(
            checkpoint_dir=str(tmp_path), tensor_parallel_size=2, max_num_seqs=4, max_num_waiting=2, standby=False
        )
    )
    client.start()
    yield client
    client.close()


def test_a_request_ends_with_its_last_answer(client: EngineClient) -> None:
    (group,) = FakeGroup.all
    heard = Heard(client, "a", {"priority": -2}, n=2)
    (add,) = group.events
    assert isinstance(add, Add)
    assert (add.request_id, add.choices, add.priority, add.params.n) == ("a", [], -2, 2)
    assert add.params.seed is not None
    with pytest.raises(RequestError, match="in use"):
        Heard(client, "a")
    group.say(Outputs([out("a", [5], index=1), out("a", [6], "stop")], ["a"]), Outputs([out("a", [7], "length", 1)]))
    assert [(o.index, o.token_ids) for o in heard.wait(3)] == [(1, [5]), (0, [6]), (1, [7])]
    Heard(client, "a")  # the id is free again
    text = client.metrics.text().decode()
    for line in ("request_success_total{finished_reason=\"length\"} 1.0", "generation_tokens_total 3.0",
                 "prompt_tokens_total 2.0", "time_to_first_token_seconds_count 1.0",
                 "inter_token_latency_seconds_count 1.0", "request_queue_time_seconds_count 1.0"):  # fmt: skip
        assert f"tpserve:{line}" in text


def test_one_answer_can_be_cancelled(client: EngineClient) -> None:
    (group,) = FakeGroup.all
    heard = Heard(client, "a", n=2)
    client.cancel("a", 1)
    client.cancel("a", 1)
    client.cancel("a", 7)
    group.say(Outputs([out("a", [5], index=1), out("a", [6])]))
    assert [o.token_ids for o in heard.wait(1)] == [[6]]
    client.cancel("a", 0)
    client.cancel("a")
    assert group.events[1:] == [Cancel("a", 1), Cancel("a", 0)]
    assert 'finished_reason="stop"} 1.0' in client.metrics.text().decode()


def test_a_new_group_goes_on_with_the_answers_that_have_not_ended(client: EngineClient) -> None:
    (group,) = FakeGroup.all
    heard = Heard(client, "a", n=3, max_new_tokens=14)
    beams = Heard(client, "b", {"priority": 5}, beam_width=2, n=2)
    fresh = Heard(client, "c", n=2)
    group.say(Outputs([out("a", [5], index=0), out("a", [6], "stop", 1)]), Outputs([out("a", [7], index=0)]))
    heard.wait(3)
    group.say(Heartbeat(1, 1, 0, 4, 3))
    until(lambda: client.heartbeat)
    group.exit_status = 1
    until(lambda: len(FakeGroup.all) == 2 and FakeGroup.all[1].events)
    group = FakeGroup.all[1]
    time.sleep(0.1)
    (a,) = group.events  # those without a token are suspected
    assert isinstance(a, Add)
    assert a.choices == [Choice(0, [5, 7]), Choice(2, [])]
    assert a.params == FakeGroup.all[0].events[0].params  # type: ignore[union-attr]  # the seed, above all
    group.say(Outputs([out("a", [8], index=0)]))
    until(lambda: len(group.events) == 2)
    group.say(Outputs([out("c", [1])]))
    until(lambda: len(group.events) == 3)
    c, b = (event for event in group.events[1:] if isinstance(event, Add))
    assert (b.choices, b.priority, c.choices) == ([], 5, [])
    group.say(Outputs([out("a", [9], "length", 0), out("a", [10], "stop", 2)], ["a"]))
    assert [o.token_ids for o in heard.wait(6)] == [[5], [6], [7], [8], [9], [10]]
    assert [o.token_ids for o in fresh.wait(1)] == [[1]]
    assert not beams.outputs
    text = client.metrics.text().decode()
    assert "tpserve:engine_restarts_total 1.0" in text
    assert "tpserve:num_preemptions_total 3.0" in text


def test_a_deadline_ends_what_has_not_ended(client: EngineClient) -> None:
    (group,) = FakeGroup.all
    start_s = time.monotonic()
    heard = Heard(client, "a", {"timeout_s": 0.2}, n=2)
    ended = Heard(client, "b", {"timeout_s": 0.2})
    group.say(Outputs([out("a", [5], "stop", 1), out("b", [5], "stop")]))
    last = heard.wait(2)[1]
    assert 0.2 <= time.monotonic() - start_s < 1
    assert (last.index, last.token_ids, last.finish_reason) == (0, [], "timeout")
    assert group.events[-1] == Cancel("a")
    group.say(Outputs([out("a", [6])]))
    time.sleep(0.1)
    assert (len(heard.outputs), len(ended.outputs)) == (2, 1)
    assert 'finished_reason="timeout"} 1.0' in client.metrics.text().decode()


def test_a_broken_receiver_harms_nobody_else(client: EngineClient) -> None:
    (group,) = FakeGroup.all

    def broken(output: RequestOutput) -> None:
        raise ZeroDivisionError

    client.submit("broken", [1], SamplingParams(), broken)
    heard = Heard(client, "a")
    group.say(Outputs([out("broken", [4]), out("a", [5])]), Outputs([out("broken", [4]), out("a", [6], "stop")]))
    assert [o.token_ids for o in heard.wait(2)] == [[5], [6]]
    assert group.events[-1] == Cancel("broken")
    assert client.ready
    assert len(FakeGroup.all) == 1


def test_closing_ends_every_answer(client: EngineClient) -> None:
    heard = Heard(client, "a", n=2)
    client.close()
    assert [(o.index, o.finish_reason) for o in heard.outputs] == [(0, "cancelled"), (1, "cancelled")]
    with pytest.raises(EngineError, match="shutting down"):
        Heard(client, "b")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 5}, "n"),
        ({"n": 3, "max_new_tokens": 60}, "n"),
        ({"beam_width": 3, "max_new_tokens": 60}, "beam_width"),
        ({"logit_bias": {90: 1.0}}, "logit_bias"),
        ({"min_p": 2.0}, "min_p"),
        ({"logprobs": True}, None),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": (3,)}, None),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(
    client: EngineClient, params: dict[str, Any], field: str | None
) -> None:
    with pytest.raises(RequestError) as caught:
        Heard(client, "a", **params)
    assert caught.value.field == field
    assert not FakeGroup.all[0].events


def test_a_full_queue_says_when_to_come_back(client: EngineClient) -> None:
    for i in range(6):
        Heard(client, str(i))
    with pytest.raises(OverloadedError) as caught:
        Heard(client, "one more")
    assert caught.value.retry_after_s == 1


def test_when_to_come_back_goes_by_the_rate_of_the_last_minute() -> None:
    requests = Requests(EngineMetrics(), Suspects(64))

    def add(name: str, submitted_s: float) -> None:
        requests.add(Request(name, [1], SamplingParams(), print, 0, submitted_s))

    add("old", 100.0)
    assert requests.retry_after_s(3, 100.5) == 1
    assert requests.retry_after_s(3, 107.5) == 8  # nobody has ended for so long
    assert requests.retry_after_s(3, 999.0) == 60
    for second in range(10):
        add("x", 100.0)
        requests.take(Outputs([out("x", [5], "stop")]), 110.0 + second)
    assert requests.retry_after_s(3, 120.0) == 3  # one a second
    assert requests.retry_after_s(3000, 120.0) == 60
    assert requests.retry_after_s(1, 178.5) == 60  # the last one, 59.5 s ago, is all that still counts


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    requests = Requests(EngineMetrics(), Suspects(64))
    for i in range(1000):
        requests.add(Request(str(i), [1], SamplingParams(), print, 0, 0.0, deadline_s=9.0))
        requests.cancel(str(i), None, 1.0)
    assert len(requests._deadlines) < 100
    requests.add(Request("0", [1], SamplingParams(), print, 0, 0.0, deadline_s=11.0))
    assert requests.expired(10.0) == []
    assert [request.request_id for request in requests.expired(11.0)] == ["0"]


def test_every_rank_sends_its_trace(client: EngineClient) -> None:
    (group,) = FakeGroup.all

    def answer() -> None:
        until(lambda: group.events)
        (event,) = group.events
        assert isinstance(event, Trace)
        group.say(RankTrace(event.trace_id, 1, []), RankTrace(event.trace_id + 9, 0, []))
        group.say(RankTrace(event.trace_id, 0, []))

    thread = threading.Thread(target=answer)
    thread.start()
    assert [trace.rank for trace in client.trace(7)] == [0, 1]
    thread.join()
    with pytest.raises(EngineError, match=r"did not answer within 0\.01 s"):
        client.trace(7, timeout_s=0.01)


def test_a_question_to_a_group_that_dies(client: EngineClient) -> None:
    (group,) = FakeGroup.all
    threading.Timer(0.1, lambda: setattr(group, "exit_status", 1)).start()
    with pytest.raises(EngineError, match="ended before it answered"):
        client.status(timeout_s=5)


def test_booking_a_token_costs_microseconds() -> None:
    """About 0.5 µs on the machine this was written on; the bound is for slow and busy ones."""
    requests = Requests(EngineMetrics(), Suspects(64))
    for i in range(64):
        requests.add(Request(str(i), [1], SamplingParams(), print, 0, 0.0))
    step = Outputs([out(str(i), [5]) for i in range(64)])
    start_s = time.perf_counter()
    for i in range(300):
        requests.take(step, float(i))
    assert (time.perf_counter() - start_s) / 300 / 64 < 30e-6
