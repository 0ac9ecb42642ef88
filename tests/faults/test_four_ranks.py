"""More ranks than two."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.fronts import demo, start
from tests.faults.streams import Clients, requests, undisturbed
from tests.faults.strikes import readiness, until

BODIES = requests(12)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_four_ranks() -> None:
    """The first one hangs, the last one dies."""
    with demo() as checkpoint:
        front = start("serve", checkpoint, 4, standby=False)
        try:
            front.wait_until_ready(240)
            expected = undisturbed(front, BODIES)
            for rank, how in ((0, signal.SIGSTOP), (3, signal.SIGKILL)):
                clients = Clients(front, BODIES, expected, 6)
                began_s = clients.last_token_s
                group = front.serving
                assert group is not None
                with readiness(front) as asking:
                    until(lambda: clients.last_token_s > began_s, "tokens")  # noqa: B023
                    os.kill(group.ranks[rank], how)
                    until(lambda: asking.first(False, 0.0), "a refusal of readiness")
                    until(front.ready, "readiness")
                assert clients.stop() == 0
                assert not clients.wrong
                assert set(front.blocks_in_use()) == {0}
        finally:
            left = front.stop()
    assert not left
