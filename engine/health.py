"""Whether a token can be made now: by what the group says of itself and, when it is idle, by making one."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.protocol import Add, Event, Outputs, Ready, RequestOutput
from tpserve.engine.sampling_params import SamplingParams

# Together two seconds: a fault of an idle group may come right after a probe.
_FRESH_S = 1.5
_PROBE_INTERVAL_S = 0.5
_REMEMBERED_S = 60.0
_PROBE_PREFIX = "\0probe"  # no user's id begins so


class Freshness:
    """When a group was last heard, and how long it may be silent.

    A group speaks at least every half second, or after every step. Where its own steps took longer in the last minute,
    it may be silent for twice as long as that.

    Attributes:
        since_s: when the group became ready.
        heard_s: when it was last heard.
    """

    def __init__(self) -> None:
        self.since_s = self.heard_s = 0.0
        self._silences: deque[tuple[float, float]] = deque()  # (when it ended, how long it was), ever shorter

    def begin(self, now_s: float) -> None:
        """A group is ready."""
        self.since_s = self.heard_s = now_s
        self._silences.clear()

    def heard(self, now_s: float) -> None:
        """It said something."""
        silence_s, self.heard_s = now_s - self.heard_s, now_s
        if silence_s > _FRESH_S / 2:
            while self._silences and self._silences[-1][1] <= silence_s:
                self._silences.pop()
            self._silences.append((now_s, silence_s))

    def limit_s(self, now_s: float) -> float:
        """How long it may be silent."""
        while self._silences and now_s - self._silences[0][0] > _REMEMBERED_S:
            self._silences.popleft()
        return max(_FRESH_S, 2 * self._silences[0][1]) if self._silences else _FRESH_S


class Keeper(Protocol):
    """What health asks of the group's keeper; see `GroupKeeper`."""

    changed: threading.Condition
    info: Ready | None
    failure: EngineError | ConfigError | None
    last_reason: str | None
    freshness: Freshness

    @property
    def is_own_thread(self) -> bool: ...

    def send(self, *events: Event) -> None: ...


class Health:
    """Answers one question, for any number of askers.

    Args:
        keeper: of the group.
        is_idle: whether nobody waits for tokens; asked with the lock held.
    """

    def __init__(self, keeper: Keeper, is_idle: Callable[[], bool]) -> None:
        self._keeper, self._is_idle = keeper, is_idle
        self._number = 0
        self._asked_s: float | None = None  # when the probe under way was sent
        self._asked: Ready | None = None  # to which group
        self._token_s = -1e9  # when a token last came, of a probe or of a request

    def take(self, outputs: Outputs) -> Outputs:
        """Notes that tokens come; returns what is for others. The lock is held."""
        if outputs.outputs:
            self._token_s = time.monotonic()
        if self._asked_s is None:
            return outputs
        mine = [output for output in outputs.outputs if output.request_id.startswith(_PROBE_PREFIX)]
        if not mine:
            return outputs
        self._answered(mine)
        others = [output for output in outputs.outputs if output not in mine]
        return Outputs(others, [name for name in outputs.scheduled if not name.startswith(_PROBE_PREFIX)])

    def unhealthy_reason(self) -> str | None:
        """None: a token can be made now; otherwise why not.

        Waits for a probe's token, at most a second and a half; not at all in the thread that delivers outputs.
        """
        keeper = self._keeper
        with keeper.changed:
            now_s = time.monotonic()
            reason = self._reason(now_s)
            if reason is not None or not self._is_idle() or now_s - self._token_s < _PROBE_INTERVAL_S:
                return reason
            if not self._under_way:
                self._ask(now_s)
            assert self._asked_s is not None
            if not keeper.is_own_thread:
                ends_s = self._asked_s + _FRESH_S
                keeper.changed.wait_for(lambda: not self._under_way, max(0.0, ends_s - now_s))
            now_s = time.monotonic()
            reason = self._reason(now_s)
            if reason is not None or not self._under_way:
                return reason
            waited_s = now_s - self._asked_s
            if waited_s < self._keeper.freshness.limit_s(now_s):
                return None
            return f"a probe has got no token for {waited_s:.1f} s"

    @property
    def _under_way(self) -> bool:
        return self._asked_s is not None and self._asked is self._keeper.info

    def _reason(self, now_s: float) -> str | None:
        keeper = self._keeper
        if keeper.failure is not None:
            return f"the engine has given up: {keeper.failure}"
        if keeper.info is None:
            return "the engine is starting" + (f" again: {keeper.last_reason}" if keeper.last_reason else "")
        silent_s = now_s - keeper.freshness.heard_s
        if silent_s > keeper.freshness.limit_s(now_s):
            return f"the rank group has been silent for {silent_s:.1f} s"
        return None

    def _ask(self, now_s: float) -> None:
        self._number += 1
        self._asked_s, self._asked = now_s, self._keeper.info
        params = SamplingParams(max_new_tokens=1, ignore_eos=True, temperature=0.0, seed=0)
        self._keeper.send(Add(f"{_PROBE_PREFIX}{self._number}", [0], params))

    def _answered(self, outputs: list[RequestOutput]) -> None:
        if any(output.request_id == f"{_PROBE_PREFIX}{self._number}" for output in outputs):
            self._asked_s = None
            self._keeper.changed.notify_all()
