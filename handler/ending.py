"""How a backend process of TorchServe's ends: not before its requests have, and never later than its engine."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tpserve.handler.health import Health

DRAIN = signal.SIGUSR1
# The process is called so when it drains and nothing is open: whoever asked needs no port and no key to see it.
DRAINED = "tps-drained"
_POLL_S = 0.1
_REPLIES_S = 1.0  # for replies that TorchServe has taken to reach their clients
_LAST_WORDS_S = 5.0

logger = logging.getLogger(__name__)


class Client(Protocol):
    """The part of `EngineClient` that ends."""

    @property
    def failure(self) -> str | None: ...
    def close(self) -> None: ...


def _leave(status: int) -> None:
    logging.shutdown()
    os._exit(status)


class Ending:
    """Watches for the two ends of a backend process; made in the main thread.

    Args:
        client: of the engine.
        health: told that the process drains.
        num_open: requests that have not been answered.
        leave: ends the process with a status.
    """

    def __init__(
        self, client: Client, health: Health, num_open: Callable[[], int], leave: Callable[[int], None] = _leave
    ) -> None:
        self._client, self._health, self._num_open, self._leave = client, health, num_open, leave
        self._thread = threading.Thread(target=self._watch, name="tpserve-ending", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Takes `DRAIN`: nothing new is answered but 503, and the process says when all is done."""
        signal.signal(DRAIN, lambda *_: self.drain())

    def drain(self) -> None:
        """What `DRAIN` does."""
        if not self._health.draining:
            self._health.draining = True
            threading.Thread(target=self._say_when_drained, name="tpserve-drain", daemon=True).start()

    def _say_when_drained(self) -> None:
        logger.info("draining: %d requests are open", self._num_open())
        idle_s = 0.0
        while idle_s < _REPLIES_S:
            time.sleep(_POLL_S)
            idle_s = 0.0 if self._num_open() else idle_s + _POLL_S
        try:
            Path("/proc/self/comm").write_text(DRAINED)
        except OSError as e:  # not Linux: the time to drain is waited for
            logger.warning("drained; it cannot be told: %s", e)

    def _watch(self) -> None:
        """TorchServe starts a process that has ended again, after longer and longer times."""
        while self._client.failure is None:
            time.sleep(_POLL_S)
        logger.error("the engine has given up, and so does this process: %s", self._client.failure)
        began_s = time.monotonic()
        while time.monotonic() - began_s < (_LAST_WORDS_S if self._num_open() else _REPLIES_S):
            time.sleep(_POLL_S)
        self._client.close()
        self._leave(1)
