"""A server whose two ranks are on two machines says what one rank says, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.machines.namespaces import cable, missing
from tests.machines.serving import OPTIONS, in_flight, serving, until
from tpserve.engine.process import descendants, is_running

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.mark.timeout(300)
def test_two_machines(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "False") as machines:
        assert len(alone) == OPTIONS["max_new_tokens"]
        assert machines.ids() == alone
        (rank,) = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            os.kill(rank, signal.SIGKILL)
        (rank,) = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            machines.agent.kill()
            machines.agent.wait()
            until(lambda: not is_running(rank), 20)  # a rank does not outlive its agent
            machines.start_agent()
        text = machines.said()
        # Who tells first is a race: when its peer dies, the head's own rank may end before the agent's word is here.
        assert "the rank group ended: a rank" in text
        assert "machine second is lost" in text
        assert machines.ask("GET", "/health/ready")[0] == 200
        machines.head.send_signal(signal.SIGTERM)
        assert machines.head.wait(30) == 0
        until(lambda: not descendants(machines.agent.pid), 20)
        machines.agent.send_signal(signal.SIGTERM)  # an agent without a head has nothing to wait for
        assert machines.agent.wait(20) == 0


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_with_a_standby_and_cut_cables(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "True", "--max_restarts", "10") as machines:
        for dying in (machines.agent, machines.head):
            until(lambda: [len(machines.ranks(one)) for one in (machines.head, machines.agent)] == [2, 2])
            time.sleep(5)  # it imports
            before = machines.ranks(machines.head) + machines.ranks(machines.agent)
            with in_flight(machines, alone):
                os.kill(min(machines.ranks(dying)), signal.SIGKILL)
            assert len({*before} & {*machines.ranks(machines.head), *machines.ranks(machines.agent)}) == 2
        ranks = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            cable(machines.machines[1], "down")
            until(lambda: not [rank for rank in ranks if is_running(rank)], 40)  # a lonely agent ends its ranks
            cable(machines.machines[1], "up")
        text = machines.said()
        assert "silent for 10 s" in text or "step_timeout_s" in text or "is lost" in text


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_head_that_dies_and_comes_back(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "False") as machines:
        ranks = machines.ranks(machines.agent)
        machines.head.kill()
        machines.head.wait()
        until(lambda: not [rank for rank in ranks if is_running(rank)], 20)
        machines.start_head()
        machines.wait_until_ready()
        assert machines.ids() == alone
