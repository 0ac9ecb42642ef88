"""How often a rank group may be relaunched, and how long to wait before: bookkeeping only."""

from __future__ import annotations

from collections import deque

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0


class Restarts:
    """Counts deaths in a window of time.

    Args:
        max_restarts: relaunches within `window_s`.
        window_s: a group that served for so long clears the count, too.
    """

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts, self._window_s = max_restarts, window_s
        self._deaths_s: deque[float] = deque()
        self._forgiven_s: deque[float] = deque()

    @property
    def count(self) -> int:
        """Deaths that count now."""
        return len(self._deaths_s)

    def died(self, now_s: float, served_s: float) -> None:
        """Counts a death of a group that had been ready for `served_s`."""
        if served_s >= self._window_s:
            self._deaths_s.clear()
        self._deaths_s.append(now_s)
        for times_s in (self._deaths_s, self._forgiven_s):
            while times_s and now_s - times_s[0] > self._window_s:
                times_s.popleft()

    def forgive(self, now_s: float, deaths: int) -> None:
        """The last deaths (0: none) were one request's doing, and it is not replayed: the group is not at fault.

        At most `max_restarts` requests a window are believed to be at fault; with more, the group is.
        """
        if not deaths or len(self._forgiven_s) >= self._max_restarts:
            return
        self._forgiven_s.append(now_s)
        for _ in range(min(deaths, len(self._deaths_s))):
            self._deaths_s.pop()

    def wait_s(self) -> float | None:
        """How long to wait before the next launch: nothing at first, then twice as long each time; None: give up."""
        if self.count > self._max_restarts:
            return None
        if self.count <= 1:
            return 0.0
        # The exponent is bounded so that no count makes the power overflow.
        return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(self.count - 2, 10)))
