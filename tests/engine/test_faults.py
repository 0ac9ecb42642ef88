"""What the client makes of groups that die, fall silent or find fewer devices; the groups are fakes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_group import FakeGroup, Heard, out, until
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.protocol import Add, Heartbeat, Outputs, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

Make = Callable[..., EngineClient]
HEARTBEAT = Heartbeat(1, 0, 0, 0, 0)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes started clients."""
    FakeGroup.all = []
    monkeypatch.setattr("tpserve.engine.standby.RankGroup", FakeGroup)
    monkeypatch.setattr(FakeGroup, "num_devices", 8)
    CheckpointInfo(ModelArgs(32, 2, 4, 2, 90, 88), "float32").write(tmp_path)
    with contextlib.ExitStack() as stack:

        def client(**options: Any) -> EngineClient:
            given = {"tensor_parallel_size": 2, "standby": False} | options
            made = EngineClient(EngineConfig(checkpoint_dir=str(tmp_path), **given))
            made.start()
            stack.callback(made.close)
            return made

        yield client


def die(n: int) -> None:
    """Ends the present group and waits for the nth one."""
    FakeGroup.all[-1].exit_status = 1
    until(lambda: len(FakeGroup.all) == n)


def counts(client: EngineClient) -> dict[str, float]:
    lines = [line for line in client.metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("tpserve:"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_a_relaunched_group_must_have_the_same_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a story would go on in another model's words."""
    client = make()
    stream = Heard(client, "stream", max_new_tokens=9)
    FakeGroup.all[0].say(Outputs([out("stream", [5])]))
    stream.wait(1)
    monkeypatch.setattr(FakeGroup, "checkpoint", "another")
    die(2)
    last = stream.wait(2)[-1]
    assert last.finish_reason == "error"
    assert "replaced while it was served" in str(last.error)
    assert "replaced" in str(client.failure)


def test_a_request_that_groups_die_of_is_set_aside(make: Make) -> None:
    client = make(max_restarts=2)
    bystander, poison = Heard(client, "bystander", max_new_tokens=9), Heard(client, "poison")
    FakeGroup.all[0].say(Outputs([out("bystander", [5])]))
    bystander.wait(1)
    for n in (2, 3):
        die(n)
        group = FakeGroup.all[-1]
        until(lambda: group.events)  # noqa: B023
        group.say(Outputs([out("bystander", [n])]))
        until(lambda: len(group.events) == 2)  # noqa: B023
        assert [event.request_id for event in group.events if isinstance(event, Add)] == ["bystander", "poison"]
    die(4)
    (last,) = poison.wait(1)
    assert last.finish_reason == "error"
    assert last.error is not None
    assert "in flight at 3 deaths" in last.error
    assert "status 1" in last.error
    FakeGroup.all[-1].say(Outputs([out("bystander", [4], "length")]))
    assert [token for o in bystander.wait(4) for token in o.token_ids] == [5, 2, 3, 4]
    assert counts(client)["requests_condemned_total"] == 1
    # The three deaths were the request's: they do not count against the group, which may die twice more.
    for n in (5, 6):
        die(n)
    assert client.failure is None


def test_requests_that_come_while_suspects_are_tried(make: Make) -> None:
    client = make()
    first, second = Heard(client, "first"), Heard(client, "second")
    die(2)
    group = FakeGroup.all[-1]
    until(lambda: group.events)
    late = Heard(client, "late")
    time.sleep(0.15)
    assert len(group.events) == 1
    group.say(Outputs([out("first", [5], "stop")]))
    until(lambda: len(group.events) == 2)
    group.say(Outputs([out("second", [6], "stop")]))
    until(lambda: len(group.events) == 3)
    group.say(Outputs([out("late", [7], "stop")]))
    assert [heard.wait(1)[0].token_ids for heard in (first, second, late)] == [[5], [6], [7]]


def test_a_wait_between_launches_ends_with_the_client(make: Make) -> None:
    client = make(max_restarts=20)
    for n in range(2, 5):
        die(n)
    FakeGroup.all[-1].exit_status = 1  # the fourth death: two seconds
    until(lambda: client.num_restarts == 4)
    start_s = time.monotonic()
    client.close()
    assert time.monotonic() - start_s < 1
    assert len(FakeGroup.all) == 4


def test_the_first_relaunch_is_immediate_and_later_ones_wait(make: Make) -> None:
    make(max_restarts=20)
    start_s = time.monotonic()
    die(2)
    assert time.monotonic() - start_s < 0.4
    start_s = time.monotonic()
    die(3)
    assert time.monotonic() - start_s >= 0.5


def test_fewer_devices(make: Make) -> None:
    client = make(tensor_parallel_size=4, elastic=True)
    assert client.info.tensor_parallel_size == 4
    heard = Heard(client, "a", max_new_tokens=9)
    FakeGroup.all[0].say(Outputs([out("a", [5])]))
    heard.wait(1)
    FakeGroup.num_devices = 3
    die(3)
    until(lambda: client.ready and FakeGroup.all[-1].events)
    assert [group.config.tensor_parallel_size for group in FakeGroup.all] == [4, 4, 3]
    assert client.info.tensor_parallel_size == counts(client)["tensor_parallel_size"] == 3
    FakeGroup.all[-1].say(Outputs([out("a", [6], "length")]))
    assert [o.token_ids for o in heard.wait(2)] == [[5], [6]]


def test_fewer_devices_than_ranks_is_an_error_unless_elastic(make: Make) -> None:
    FakeGroup.num_devices = 1
    with pytest.raises(ConfigError, match="too few"):
        make()
    assert len(FakeGroup.all) == 1


def test_a_standby_is_launched_when_a_group_is_ready_and_takes_over(make: Make) -> None:
    client = make(standby=True)
    until(lambda: len(FakeGroup.all) == 2)
    first, standby = FakeGroup.all
    assert (first.has_gone, standby.has_gone) == (True, False)
    first.exit_status = 1
    until(lambda: len(FakeGroup.all) == 3 and client.ready)
    assert (standby.has_gone, FakeGroup.all[2].has_gone) == (True, False)
    client.close()
    assert all(group.killed for group in FakeGroup.all if group is not standby)


def test_a_standby_of_another_size_is_not_taken(make: Make) -> None:
    client = make(standby=True, elastic=True)
    until(lambda: len(FakeGroup.all) == 2)
    FakeGroup.num_devices = 1
    FakeGroup.all[0].exit_status = 1
    until(lambda: len(FakeGroup.all) == 4 and client.ready)
    assert [group.config.tensor_parallel_size for group in FakeGroup.all] == [2, 2, 1, 1]


def test_a_stopped_standby_is_not_taken(make: Make) -> None:
    client = make(standby=True)
    until(lambda: len(FakeGroup.all) == 2)
    first, standby = FakeGroup.all
    standby.is_stopped = True
    first.exit_status = 1
    until(lambda: len(FakeGroup.all) == 4 and client.ready)
    assert (standby.killed, standby.has_gone, FakeGroup.all[2].has_gone) == (True, False, True)


def test_a_standby_that_is_stopped_while_it_waits_is_ended(make: Make) -> None:
    make(standby=True)
    until(lambda: len(FakeGroup.all) == 2)
    FakeGroup.all[1].is_stopped = True
    until(lambda: FakeGroup.all[1].killed)


def test_no_standby_where_nothing_is_relaunched(make: Make) -> None:
    make(standby=True, max_restarts=0)
    time.sleep(0.2)
    assert len(FakeGroup.all) == 1


def answer_probes(group: FakeGroup) -> threading.Event:
    """Answers every probe until the event is set."""
    stop = threading.Event()

    def run() -> None:
        answered = 0
        while not stop.wait(0.01):
            group.say(HEARTBEAT)
            for event in group.events[answered:]:
                answered += 1
                assert isinstance(event, Add)
                group.say(Outputs([out(event.request_id, [5], "length")], [event.request_id]))

    threading.Thread(target=run, daemon=True).start()
    return stop


def test_an_idle_group_is_probed_twice_a_second_and_nobody_counts_it(make: Make) -> None:
    client = make()
    stop = answer_probes(FakeGroup.all[0])
    try:
        assert [client.unhealthy_reason() for _ in range(200)] == [None] * 200
        assert 1 <= len(FakeGroup.all[0].events) <= 3
        time.sleep(1.1)
        assert client.unhealthy_reason() is None
        assert 2 <= len(FakeGroup.all[0].events) <= 6
    finally:
        stop.set()
    assert [counts(client)[name] for name in ("generation_tokens_total", "time_to_first_token_seconds_count",
                                              "request_queue_time_seconds_count")] == [0, 0, 0]  # fmt: skip


def test_a_probe_without_an_answer(make: Make) -> None:
    client = make()
    group = FakeGroup.all[0]
    beating = threading.Event()

    def beat() -> None:  # rank 0 turns, and no token comes
        while not beating.wait(0.05):
            group.say(HEARTBEAT)

    threading.Thread(target=beat, daemon=True).start()
    try:
        start_s = time.monotonic()
        reasons: list[str | None] = []
        askers = [threading.Thread(target=lambda: reasons.append(client.unhealthy_reason())) for _ in range(5)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert all("probe" in str(reason) for reason in reasons), reasons
        assert 1.4 < time.monotonic() - start_s < 8
        start_s = time.monotonic()
        assert "probe" in str(client.unhealthy_reason())
        assert time.monotonic() - start_s < 1  # known by now
        assert len(group.events) == 1
        probe = group.events[0]
        assert isinstance(probe, Add)
        group.say(Outputs([out(probe.request_id, [5], "length")]))
        until(lambda: client.unhealthy_reason() is None)
    finally:
        beating.set()


def test_silence(make: Make) -> None:
    client = make()
    heard = Heard(client, "a")
    FakeGroup.all[0].say(Outputs([out("a", [5])]))
    heard.wait(1)
    assert client.unhealthy_reason() is None
    until(lambda: "silent" in str(client.unhealthy_reason()))
    FakeGroup.all[0].say(HEARTBEAT)
    until(lambda: client.unhealthy_reason() is None)


def test_no_group(make: Make) -> None:
    client = make(max_restarts=1)
    FakeGroup.silent = True
    try:
        FakeGroup.all[-1].exit_status = 7
        until(lambda: len(FakeGroup.all) == 2)
        assert client.unhealthy_reason() == "the engine is starting again: status 7"
        FakeGroup.all[-1].exit_status = 8
        until(lambda: client.failure)
        assert "given up" in str(client.unhealthy_reason())
    finally:
        FakeGroup.silent = False


def test_health_may_be_asked_from_the_thread_that_delivers(make: Make) -> None:
    client = make()
    said: list[tuple[str | None, float]] = []

    def take(output: RequestOutput) -> None:
        start_s = time.monotonic()
        said.append((client.unhealthy_reason(), time.monotonic() - start_s))

    client.submit("a", [1], SamplingParams(max_new_tokens=3), take)
    FakeGroup.all[0].say(Outputs([out("a", [5])]), Outputs([out("a", [6], "length")]))
    until(lambda: len(said) == 2)
    assert [reason for reason, _ in said] == [None, None]
    assert all(took_s < 1 for _, took_s in said)
