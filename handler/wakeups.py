"""From the engine's thread to the tasks of an event loop: who has something new."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque


class Wakeups:
    """Hands signals over to a loop. What one step of the engine has for many requests costs the loop one call.

    Args:
        loop: whose tasks wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung: deque[asyncio.Event] = deque()  # thread-safe at both ends
        self._called = False

    def ring(self, event: asyncio.Event) -> None:
        """Sets an event; from any thread."""
        self._rung.append(event)
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited with it
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before looking: what is rung from now on calls again
        while self._rung:
            self._rung.popleft().set()


class Wakeup:
    """What one request's task waits for; a `Signal`.

    Args:
        wakeups: of the task's loop.
    """

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self._event = asyncio.Event()

    def set(self) -> None:
        """There is something new; from any thread."""
        if not self._event.is_set():  # else the task has not looked yet
            self._wakeups.ring(self._event)

    async def wait(self) -> None:
        """Returns when there may be something new; call it from one task only."""
        await self._event.wait()
        self._event.clear()
