"""How a backend process of TorchServe's ends: with its engine, or when it is asked to and all is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.handler.fakes import FakeEngine, backend
from tests.handler.frontend import HELLO, Frontend
from tests.handler.web import wait_for
from tpserve.engine.errors import ConfigError
from tpserve.handler import torchserve_command
from tpserve.handler.ending import DRAINED, Ending
from tpserve.handler.mailbox import Mailbox


class Client(FakeEngine):
    closed = False

    def close(self) -> None:
        self.closed = True


def test_it_ends_with_its_engine_when_the_clients_know() -> None:
    engine, left = Client(), []
    served = backend(engine)
    mailbox = Mailbox(served)
    frontend = Frontend(mailbox)
    Ending(engine, served.health, lambda: mailbox.num_open, left.append)
    frontend.call({"a": ({"body": HELLO}, {"body": {"content-type": "application/json"}, "url_path": ""})})
    engine.failure = "rank 1 died"
    engine.say("a/0", [], "error", error="rank 1 died")
    assert not left
    frontend.call()
    assert frontend.status["a"] == 503
    wait_for(lambda: left == [1], timeout_s=30)
    assert engine.closed
    mailbox.close()


def test_it_says_when_it_has_drained() -> None:
    engine, name = Client(), Path("/proc/self/comm")
    health, before = backend(engine).health, Path("/proc/self/comm").read_text()
    num_open = [1]
    ending = Ending(engine, health, lambda: num_open[0], lambda _: None)
    try:
        ending.drain()
        assert health.draining
        assert name.read_text().strip() != DRAINED
        num_open[0] = 0
        wait_for(lambda: name.read_text().strip() == DRAINED, timeout_s=30)
    finally:
        name.write_text(before)
        engine.failure = "the test is over"


@pytest.mark.parametrize("given", [["--drain_timeout_s"], ["--drain-timeout-s=soon"], ["--drain_timeout_s", "-1"]])
def test_a_time_to_drain_that_is_none(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="drain_timeout_s must be a number of at least 0"):
        torchserve_command.run(["--stop", *given])
