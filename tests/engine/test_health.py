"""What the client says of a group's health: probes, silence, and no group at all; the groups are fakes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_group import FakeGroup, Heard, Make, counts, fake_clients, out, until
from tpserve.engine.protocol import Add, Heartbeat, Outputs, RequestOutput
from tpserve.engine.sampling_params import SamplingParams

HEARTBEAT = Heartbeat(1, 0, 0, 0, 0)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes started clients."""
    with fake_clients(tmp_path, monkeypatch) as make:
        yield make


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
