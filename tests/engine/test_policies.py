"""Back-off, sizes and freshness: what the keeper of a rank group goes by, without processes."""

from __future__ import annotations

import pytest

from tpserve.engine.elastic import TensorParallelSize, largest_fitting_size
from tpserve.engine.health import Freshness
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.recovery import Recovery
from tpserve.engine.restarts import Restarts
from tpserve.model.args import ModelArgs

ARGS = ModelArgs(96, 2, 12, 4, 90, 88)  # sizes 1, 2, 4, 12


def test_waits_double_and_end() -> None:
    restarts = Restarts(max_restarts=10, window_s=300.0)
    waits = []
    for second in range(11):
        restarts.died(float(second), 0.0)
        waits.append(restarts.wait_s())
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, None]


def test_deaths_leave_the_window() -> None:
    restarts = Restarts(max_restarts=1, window_s=10.0)
    for second in range(0, 100, 11):
        restarts.died(float(second), 0.0)
        assert restarts.wait_s() == 0.0
    restarts.died(100.0, 0.0)
    assert restarts.wait_s() is None


def test_a_group_that_served_for_long_clears_the_count() -> None:
    restarts = Restarts(max_restarts=2, window_s=10.0)
    restarts.died(0.0, 0.0)
    restarts.died(0.1, 0.0)
    assert restarts.wait_s() == 0.5
    restarts.died(10.05, 10.0)
    assert (restarts.count, restarts.wait_s()) == (1, 0.0)


def test_no_restart_at_all() -> None:
    restarts = Restarts(max_restarts=0, window_s=10.0)
    restarts.died(0.0, 0.0)
    assert restarts.wait_s() is None


def test_deaths_of_condemned_requests_are_forgiven_but_not_for_ever() -> None:
    restarts = Restarts(max_restarts=2, window_s=100.0)
    now_s = 0.0
    for _ in range(2):
        for n in range(3):
            restarts.died(now_s := now_s + 1, 0.0)
            restarts.forgive(now_s, 0)
            if n < 2:
                assert restarts.wait_s() is not None
        restarts.forgive(now_s, 3)
        assert restarts.count == 0
    for _ in range(3):
        restarts.died(now_s := now_s + 1, 0.0)
    restarts.forgive(now_s, 3)  # too many requests: it is the group
    assert restarts.wait_s() is None


def test_many_deaths_do_not_overflow() -> None:
    restarts = Restarts(max_restarts=5000, window_s=1e9)
    for second in range(3000):
        restarts.died(float(second), 0.0)
    assert restarts.wait_s() == 30.0


@pytest.mark.parametrize(("most", "size"), [(13, 12), (12, 12), (11, 11), (1, 1), (0, None), (-1, None)])
def test_sizes_that_fit(most: int, size: int | None) -> None:
    assert largest_fitting_size(ARGS, most) == size


def test_missing_devices() -> None:
    size = TensorParallelSize(ARGS, 12, elastic=True)
    assert size.devices_missing(7)
    assert size.size == 7
    assert size.devices_missing(9)  # it was said of another size: smaller it must be
    assert size.size == 6
    assert not size.devices_missing(0)
    assert not TensorParallelSize(ARGS, 12, elastic=False).devices_missing(7)


def test_a_group_that_does_not_come_back() -> None:
    size = TensorParallelSize(ARGS, 3, elastic=True)
    assert not any(size.failed_to_start() for _ in range(5)), "it had never served"
    size.served()
    assert [size.failed_to_start(), size.failed_to_start(), size.size] == [False, True, 2]
    assert [size.failed_to_start(), size.failed_to_start(), size.size] == [False, True, 1]
    assert [size.failed_to_start(), size.failed_to_start(), size.size] == [False, False, 1]
    rigid = TensorParallelSize(ARGS, 4, elastic=False)
    rigid.served()
    assert not any(rigid.failed_to_start() for _ in range(5))


def test_a_silence_may_be_as_long_as_the_groups_own_steps() -> None:
    fresh = Freshness()
    fresh.begin(100.0)
    for tenth in range(1, 50):
        fresh.heard(100.0 + tenth / 10)
    assert fresh.limit_s(105.0) == 1.5
    fresh.heard(112.9)  # a step of eight seconds
    assert fresh.limit_s(113.0) == pytest.approx(16.0)
    fresh.heard(115.9)
    assert fresh.limit_s(116.0) == pytest.approx(16.0)
    assert fresh.limit_s(174.0) == pytest.approx(6.0)  # a minute later only the shorter one is remembered
    assert fresh.limit_s(180.0) == 1.5
    fresh.begin(200.0)
    assert fresh.limit_s(200.0) == 1.5


def test_the_stopwatch_of_recoveries() -> None:
    metrics = EngineMetrics()
    recovery = Recovery(metrics)
    recovery.ready(1.0, 0)  # the first start is none
    assert metrics.recovery_s == 0.0
    recovery.died(10.0)
    recovery.died(12.0)  # the next one did not come up
    recovery.ready(15.0, 2)
    assert (metrics.recovery_s, recovery.awaits_token) == (5.0, True)
    recovery.token(16.0)
    recovery.token(17.0)
    assert (metrics.recovery_to_token_s, recovery.awaits_token) == (6.0, False)
    recovery.died(20.0)
    recovery.ready(21.0, 1)
    recovery.died(30.0)  # before a token
    recovery.ready(32.0, 0)
    assert (metrics.recovery_s, metrics.recovery_to_token_s, recovery.awaits_token) == (2.0, 6.0, False)
    text = metrics.text().decode()
    assert "tpserve:engine_recovery_seconds 2.0" in text
    assert "tpserve:engine_recovery_to_token_seconds 6.0" in text
