"""What the client makes of groups that die or find fewer devices; the groups are fakes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_group import FakeGroup, Heard, Make, counts, fake_clients, out, until
from tpserve.engine.errors import ConfigError
from tpserve.engine.protocol import Add, Outputs


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes started clients."""
    with fake_clients(tmp_path, monkeypatch) as make:
        yield make


def die(n: int) -> None:
    """Ends the present group and waits for the nth one."""
    FakeGroup.all[-1].exit_status = 1
    until(lambda: len(FakeGroup.all) == n)


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
