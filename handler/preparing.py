"""Requests that take time to read: they are read in a few threads beside the one that serves the front, so that streams
go on meanwhile."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from tpserve.engine.errors import OverloadedError
from tpserve.handler.http import Signal
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply

_NUM_THREADS = 4
MAX_WAITING = 64


class Prepared:
    """A request that a thread opens; a `Pending`.

    Args:
        open_: opens it; never raises.
        refuse: from a message to the reply of a request that never came to that.
        signal: set when it is open; later whoever opened it sets it.

    Attributes:
        opened: what became of it; None: it has not been opened yet.
    """

    def __init__(self, open_: Callable[[], Pending | Reply], refuse: Callable[[str], Reply], signal: Signal) -> None:
        self._open, self._refuse, self._signal = open_, refuse, signal
        self._lock = threading.Lock()
        self.opened: Pending | Reply | None = None
        self._ended = False

    @property
    def engine_ids(self) -> tuple[str, ...]:
        """Of what was opened."""
        return () if self.opened is None or isinstance(self.opened, Reply) else self.opened.engine_ids

    def run(self, cancel: Callable[[Pending], None]) -> None:
        """Opens it, in a thread; `cancel` is for one whose client has gone meanwhile."""
        if self._ended:
            return
        opened = self._open()
        with self._lock:
            self.opened = self.opened or opened
            ended = self._ended or self.opened is not opened
        if ended and not isinstance(opened, Reply):
            cancel(opened)
        self._signal.set()

    def end(self) -> Pending | None:
        """Nobody waits for it any more; returns what was opened."""
        with self._lock:
            self._ended = True
            return None if isinstance(self.opened, Reply) else self.opened

    def take(self) -> Reply | None:
        """See `Pending`."""
        opened = self.opened
        return opened if opened is None or isinstance(opened, Reply) else opened.take()

    def fail(self, message: str) -> None:
        """See `Pending`."""
        with self._lock:
            if self.opened is None:
                self.opened = self._refuse(message)
                self._signal.set()
                return
        if not isinstance(self.opened, Reply):
            self.opened.fail(message)


class Preparer:
    """The threads. They start when they are needed, and end when there is nothing to do.

    Args:
        cancel: frees what was opened for nobody.
    """

    def __init__(self, cancel: Callable[[Pending], None]) -> None:
        self._cancel = cancel
        self._lock = threading.Lock()
        self._waiting: deque[Prepared] = deque()
        self._num_threads = 0

    def start(self, prepared: Prepared) -> Prepared:
        """Has it opened, after those that wait already.

        Raises:
            OverloadedError: there are too many.
        """
        with self._lock:
            if len(self._waiting) >= MAX_WAITING:
                raise OverloadedError(
                    f"{MAX_WAITING} requests that take time to read are waiting, {MAX_WAITING} are admitted"
                )
            self._waiting.append(prepared)
            if self._num_threads < _NUM_THREADS:
                self._num_threads += 1
                threading.Thread(target=self._run, name="tpserve-prepare", daemon=True).start()
        return prepared

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_threads -= 1
                    return
                prepared = self._waiting.popleft()
            prepared.run(self._cancel)
