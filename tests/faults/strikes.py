"""Faults, one at a time, and what a server made of each: when it said so, when it served again, what it left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.fronts import Front
from tests.faults.processes import Group
from tpserve.engine.process import is_running

KINDS = (
    "kill rank 0", "kill rank 1", "stop rank 0", "stop rank 1", "kill torchrun",
    "kill a rank, and one of the next group as it comes up", "kill the standby", "stop the standby, then kill a rank",
)  # fmt: skip
_PATIENCE_S = 180.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a fault; times count from the signal.

    Attributes:
        kind: of `KINDS`.
        warm: a standby group was waiting.
        unready_s: until readiness was denied; None: it never was.
        ready_s: until it was granted again.
        token_s: until the next token of any client; None: nobody asked, or the serving group was not touched.
        left: processes of the old group that live.
    """

    kind: str
    warm: bool
    unready_s: float | None
    ready_s: float | None
    token_s: float | None
    left: tuple[int, ...]


class Readiness:
    """Asks for readiness ten times a second; every answer is kept."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._said: list[tuple[float, bool]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Asks no more."""
        self._stopping.set()
        self._thread.join()

    def first(self, ready: bool, after_s: float) -> float | None:
        """When it first said so."""
        return next((said_s for said_s, said in list(self._said) if said_s > after_s and said == ready), None)

    def _run(self) -> None:
        while not self._stopping.wait(0.1):
            ready = self._front.ready()
            self._said.append((time.monotonic(), ready))
            del self._said[:-2000]


@contextlib.contextmanager
def readiness(front: Front) -> Iterator[Readiness]:
    """Asks for the time of the block."""
    asking = Readiness(front)
    try:
        yield asking
    finally:
        asking.close()


def until(condition: Callable[[], object], what: str, timeout_s: float = _PATIENCE_S) -> None:
    """Waits, and fails with what was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def strike(front: Front, kind: str, asking: Readiness, last_token_s: Callable[[], float] | None = None) -> Outcome:
    """Does it, and waits until the server serves again.

    Args:
        front: ready.
        kind: of `KINDS`.
        asking: for readiness.
        last_token_s: when a client last had a token; None: nobody asks for any.
    """
    until(lambda: front.serving, "a group that serves")
    if "standby" in kind:
        until(lambda: front.standby, "a group that waits")
    group, standby = front.serving, front.standby
    assert group is not None
    struck_s = time.monotonic()
    victims = _strike(kind, group, standby)
    if group not in victims:  # nobody notices
        assert standby is not None
        until(lambda: not is_running(standby.launcher), "the end of the standby group")
        return Outcome(kind, False, None, None, None, _alive(standby))
    if "next group" in kind:
        until(lambda: _coming(front, group), "the next group")
        coming = _coming(front, group)
        assert coming is not None
        _signal(coming.ranks[-1], signal.SIGKILL)
        victims.append(coming)

    def serves() -> bool:
        now = front.serving
        return now is not None and all(now.launcher != victim.launcher for victim in victims)

    until(serves, f"another group after: {kind}")
    back_s = time.monotonic()
    token_s = None
    if last_token_s is not None:
        # The new group's sockets are there: no token of the old one can be on its way any more.
        until(lambda: last_token_s() > back_s, f"a token after: {kind}")
        token_s = last_token_s() - struck_s
    until(front.ready, f"readiness after: {kind}")
    until(lambda: asking.first(True, back_s), f"readiness after: {kind}")
    unready_s, ready_s = asking.first(False, struck_s), asking.first(True, back_s)
    if unready_s is not None and ready_s is not None and unready_s > ready_s:
        unready_s = None
    return Outcome(
        kind,
        standby is not None and "standby" not in kind,
        None if unready_s is None else unready_s - struck_s,
        None if ready_s is None else ready_s - struck_s,
        token_s,
        tuple(pid for victim in victims for pid in _alive(victim)),
    )


def _strike(kind: str, group: Group, standby: Group | None) -> list[Group]:
    match kind:
        case "kill rank 0" | "kill rank 1":
            _signal(group.ranks[int(kind[-1])], signal.SIGKILL)
        case "stop rank 0" | "stop rank 1":
            _signal(group.ranks[int(kind[-1])], signal.SIGSTOP)
        case "kill torchrun":
            _signal(group.launcher, signal.SIGKILL)
        case "kill the standby":
            assert standby is not None
            _signal(standby.ranks[-1], signal.SIGKILL)
            return [standby]
        case "stop the standby, then kill a rank":
            assert standby is not None
            _signal(standby.ranks[-1], signal.SIGSTOP)
            _signal(group.ranks[-1], signal.SIGKILL)
            return [group, standby]
        case _:
            _signal(group.ranks[0], signal.SIGKILL)
    return [group]


def _coming(front: Front, group: Group) -> Group | None:
    """The group after this one, between `go` and ready: rank 0 has connected to the client."""
    names = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    return next(
        (
            one
            for one in front.groups
            if one.launcher != group.launcher and names.count(str(one.folder / "client")) > 1  # one listens
        ),
        None,
    )


def _alive(group: Group) -> tuple[int, ...]:
    return tuple(pid for pid in group.pids if is_running(pid))


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
