"""The step loop."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tpserve.engine import loop
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import Event, Outputs, RankStatus, RankTrace, Report, StepMessage, Stop
from tpserve.engine.tracer import Tracer

# A core, a channel and a frontend of a group that has been told to stop. In a process of its own: what is frozen and
# thawed in one that runs tests is collected at another time than pytest expects.
SCRIPT = """
import gc, sys
from types import SimpleNamespace
from tpserve.engine.config import EngineConfig
from tpserve.engine.loop import follow, lead
gc.disable()  # as a rank begins
ended, config = SimpleNamespace(stopped=True), EngineConfig(checkpoint_dir="none")
lead(ended, config, None, None) if sys.argv[1] == "lead" else follow(ended, config, None)
print(gc.get_freeze_count(), gc.isenabled())
"""


@pytest.mark.parametrize("role", ["lead", "follow"])
def test_a_rank_starts_with_a_heap_that_no_collection_walks(role: str) -> None:
    """A full round over what torch's import leaves takes 0.15 s, and is everybody's pause."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, role], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frozen, enabled = done.stdout.split()
    assert (int(frozen) > 10_000, enabled) == (True, "True")


class Frontend:
    """Hands out what is to come, and notes how long it might have waited."""

    def __init__(self, *events: list[Event]) -> None:
        self._events, self.waits_s = list(events), list[float]()

    def receive(self, timeout_s: float) -> list[Event]:
        self.waits_s.append(timeout_s)
        return self._events.pop(0)

    def send(self, reply: object) -> None: ...

    def send_outputs(self, outputs: Outputs) -> None: ...


class Core:
    """Has work for one step behind each request."""

    rank = checksum = 0
    step_count = 1  # not one at which ranks compare
    shape = SimpleNamespace(num_blocks=1)
    pool = SimpleNamespace(num_in_use=0)
    scheduler = SimpleNamespace(
        running=[], waiting=[], residency=SimpleNamespace(num_preemptions=0), prefix_queries=0, prefix_hits=0,
        num_draft_tokens=0, num_accepted_tokens=0,
    )  # fmt: skip

    def __init__(self) -> None:
        self.tracer = Tracer(0)
        self.stopped = self.unchecked = False
        self.done: list[str] = []
        self._left = 0

    @property
    def is_idle(self) -> bool:
        return not self._left

    def apply(self, events: list[Event]) -> None:
        self.stopped = any(isinstance(event, Stop) for event in events)
        self._left += 2 * sum(isinstance(event, Report) for event in events)  # in the place of a request

    def step(self) -> Outputs:
        if self._left:
            self._left -= 1
            self.unchecked = True
            self.done.append("step")
        return Outputs([], [])

    def check_integrity(self) -> None:
        if self.unchecked:
            self.unchecked = False
            self.done.append("check")

    def take_reports(self) -> list[RankStatus]:
        return []


class Channel:
    """Between the ranks: what rank 0 has sent, others receive."""

    def __init__(self) -> None:
        self.messages: list[StepMessage] = []

    def send(self, message: StepMessage) -> None:
        self.messages.append(message)

    def beat(self) -> None: ...


class LeaderChannel(Channel):
    def receive(self) -> list[RankStatus | RankTrace]:
        return []


class FollowerChannel(Channel):
    def receive(self) -> StepMessage:
        return self.messages.pop(0)


def test_books_are_looked_through_when_nobody_has_come_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes right behind an answer does not wait for it; on all ranks alike."""
    monkeypatch.setattr(loop, "settle_heap", lambda: None)
    config = EngineConfig(checkpoint_dir="none", checksum_interval=1000)
    request: list[Event] = [Report(1)]
    stop: list[Event] = [Stop()]
    coming = [request, [], request, [], [], [], request, [], stop]
    core, frontend, channel = Core(), Frontend(*coming), LeaderChannel()
    loop.lead(core, config, channel, frontend)  # type: ignore[arg-type]
    assert core.done == ["step", "step", "step", "step", "check", "step", "step", "check"]  # the last time at the end
    assert frontend.waits_s == [0.5, 0.0, loop._QUIET_S, 0.0, loop._QUIET_S, 0.5, 0.5, 0.0, loop._QUIET_S]
    follower, told = Core(), FollowerChannel()
    told.messages = [StepMessage(follower.step_count, message.events) for message in channel.messages]
    loop.follow(follower, config, told)  # type: ignore[arg-type]
    assert follower.done == core.done
