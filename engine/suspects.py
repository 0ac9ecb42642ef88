"""Which request is to blame when rank groups die: bookkeeping only, no processes and no clock of its own.

A *life* is one rank group from ready to its end. A request is *unproven* in a life until its first token there. When a
group dies, whatever was unproven is suspected: those with a token in this life have shown that they can run, for a
replay computes again what they had. Suspects are then given to the next group one at a time, each when nobody else is
unproven, so that a further death has one possible author. Its third death in a row (see `deaths_to_condemn`) condemns
a request that was the only suspect.
"""

from __future__ import annotations

import dataclasses
import math

MAX_DEATHS = 3
MOST_DEATHS = 6
MAX_TRIAL_S = 5.0


def deaths_to_condemn(max_restarts: int) -> int:
    """How many deaths in a row condemn a request.

    Where groups are expected to die of other things, and often, coincidences are expected, too: who runs long without
    a token, as a beam search does, is met by them again and again.

    Args:
        max_restarts: of the group; not every death may be waited for.
    """
    return min(max(MAX_DEATHS, max_restarts), MOST_DEATHS)


@dataclasses.dataclass(frozen=True)
class Condemned:
    """A request that is not replayed any more; it was in flight at `deaths` deaths without a token between them."""

    request_id: str
    deaths: int


class Suspects:
    """The books. Callers hold a lock.

    Args:
        max_running: requests that a group runs at once; what waits behind them in the group is not suspected.
        max_deaths: see the module's text.
        max_trial_s: how long the others wait for a suspect that neither gets a token nor kills anybody (a beam search
            says nothing before its end, a long prompt takes its time).
    """

    def __init__(self, max_running: int, max_deaths: int = MAX_DEATHS, max_trial_s: float = MAX_TRIAL_S) -> None:
        self._max_running, self._max_deaths, self._max_trial_s = max_running, max_deaths, max_trial_s
        self._living = False  # a group has been born and has not died
        self._sending = False  # and requests are sent to it
        self._unproven: dict[str, int] = {}  # sent in this life, no token yet; their priority
        self._deaths: dict[str, int] = {}  # in a row, without a token between them
        self._held: dict[str, int] = {}  # suspects that wait for their turn
        self._later: dict[str, int] = {}  # not suspected; wait until all suspects have been tried
        self._trial_ends_s = math.inf

    @property
    def num_held(self) -> int:
        """Requests that are held back."""
        return len(self._held) + len(self._later)

    def submitted(self, request_id: str, priority: int) -> bool:
        """Takes a new request; whether it may be sent now. When there is no group, `born` will say."""
        if self._held or self._trial_ends_s < math.inf:
            self._later[request_id] = priority
        elif self._sending:
            self._unproven[request_id] = priority
            return True
        return False

    def proven(self, request_id: str) -> None:
        """It got a token."""
        if self._unproven.pop(request_id, None) is not None:
            self._deaths.pop(request_id, None)

    def ended(self, request_id: str) -> None:
        """It is over, for whatever reason."""
        for books in (self._unproven, self._deaths, self._held, self._later):
            books.pop(request_id, None)

    def born(self, requests: dict[str, int], now_s: float) -> list[str]:
        """A group is ready.

        Args:
            requests: all that are in flight, in order of arrival, and their priorities.
            now_s: the time.

        Returns:
            those that it is given at once; `due` says when the others' turn has come.
        """
        self._living = self._sending = True
        if self._held:
            self._trial_ends_s = now_s + self._max_trial_s
        else:
            self._later = {}
        now = {name: n for name, n in requests.items() if name not in self._held and name not in self._later}
        self._unproven = dict(now)
        return list(now)

    def due(self, now_s: float) -> list[str]:
        """Those whose turn has come: the next suspect, or in the end all that waited for the suspects."""
        if self._trial_ends_s == math.inf or not self._sending:
            return []
        if self._unproven and now_s < self._trial_ends_s:
            return []
        if self._held:
            name = next(iter(self._held))
            self._unproven[name] = self._held.pop(name)
            self._trial_ends_s = now_s + self._max_trial_s
            return [name]
        self._trial_ends_s = math.inf
        later, self._later = self._later, {}
        self._unproven.update(later)
        return list(later)

    def stopped(self) -> None:
        """The group is sent nothing any more: its end has been noticed, and `died` will follow."""
        self._sending = False

    def died(self) -> Condemned | None:
        """The group died after it was ready; returns the request that is condemned for it."""
        if not self._living:
            return None
        self._living = self._sending = False
        self._trial_ends_s = math.inf
        # A group admits by priority, then by arrival; sorted() keeps the order among equals.
        unproven = dict(sorted(self._unproven.items(), key=lambda item: item[1]))
        self._unproven = {}
        names = list(unproven)[: self._max_running]
        for name in names:
            self._deaths[name] = self._deaths.get(name, 0) + 1
        condemned = None
        if len(unproven) == 1 and self._deaths[names[0]] >= self._max_deaths:
            condemned = Condemned(names[0], self._deaths[names[0]])
            self.ended(names[0])
            names = []
        # Who has just been tried goes last: the innocent are cleared before it kills again.
        self._held |= {name: unproven[name] for name in names}
        if self._held:
            self._later = {name: n for name, n in unproven.items() if name not in self._held} | self._later
        if condemned is not None:
            self._later.pop(condemned.request_id, None)
        return condemned
