"""The step loop: rank 0 leads, the others follow, all of them step."""

from __future__ import annotations

import time
from typing import Protocol

from tpserve.engine.channel import FollowerChannel, LeaderChannel
from tpserve.engine.config import EngineConfig
from tpserve.engine.core import EngineCore
from tpserve.engine.errors import EngineError
from tpserve.engine.process import settle_heap
from tpserve.engine.protocol import Event, Heartbeat, Outputs, RankStatus, RankTrace, Reply, Status, StepMessage

HEARTBEAT_INTERVAL_S = 0.5
# Without a request, until the books are looked through, which takes the longer the more blocks there are: whoever comes
# right behind the last answer should not wait for it.
_QUIET_S = 0.05


class Frontend(Protocol):
    """Who asks rank 0 for tokens."""

    def receive(self, timeout_s: float) -> list[Event]:
        """What is new; waits at most so long for the first event."""
        ...

    def send_outputs(self, outputs: Outputs) -> None:
        """Takes one step's tokens."""
        ...

    def send(self, reply: Reply) -> None:
        """Takes anything else."""
        ...


def lead(core: EngineCore, config: EngineConfig, channel: LeaderChannel, frontend: Frontend) -> None:
    """Rank 0: orders the events, tells the others, steps; returns after a `Stop`.

    Raises:
        EngineError: another rank failed, fell silent or decided otherwise.
    """
    settle_heap()
    agreement = _Agreement(config.tensor_parallel_size)
    heard_s = 0.0
    while not core.stopped:
        idle = core.is_idle
        events = frontend.receive((_QUIET_S if core.unchecked else HEARTBEAT_INTERVAL_S) if idle else 0.0)
        channel.send(StepMessage(core.step_count, events))
        core.apply(events)
        outputs = core.step()
        if outputs.outputs or outputs.scheduled:
            with core.tracer.span("send"):
                frontend.send_outputs(outputs)
        if idle and (core.stopped or not events):
            core.check_integrity()
        statuses: list[RankStatus] = core.take_reports()
        if _compares(core, config):
            statuses.append(core.status())
        received: list[RankStatus | RankTrace] = [*channel.receive(), *core.tracer.take()]
        for message in received:
            if isinstance(message, RankTrace):
                frontend.send(message)
            else:
                statuses.append(message)
        for status in agreement.add(statuses):
            frontend.send(status)
        now_s = time.monotonic()
        if now_s - heard_s >= HEARTBEAT_INTERVAL_S / 2:
            heard_s = now_s
            frontend.send(_heartbeat(core))


def follow(core: EngineCore, config: EngineConfig, channel: FollowerChannel) -> None:
    """The other ranks: do what rank 0 ordered; returns after a `Stop`.

    Raises:
        EngineError: rank 0 fell silent, or messages were lost.
    """
    settle_heap()
    while not core.stopped:
        message = channel.receive()
        channel.beat()
        if message.step != core.step_count:
            raise EngineError(f"rank 0 is at step {message.step}, this rank at {core.step_count}")
        idle = core.is_idle
        core.apply(message.events)
        core.step()
        if idle and (core.stopped or not message.events):
            core.check_integrity()
        reports: list[RankStatus | RankTrace] = [*core.take_reports(), *core.tracer.take()]
        for report in reports:
            channel.send(report)
        if _compares(core, config):
            channel.send(core.status())


def _compares(core: EngineCore, config: EngineConfig) -> bool:
    return core.step_count % config.checksum_interval == 0


def _heartbeat(core: EngineCore) -> Heartbeat:
    scheduler = core.scheduler
    return Heartbeat(
        core.step_count,
        len(scheduler.running),
        len(scheduler.waiting),
        core.pool.num_in_use,
        scheduler.residency.num_preemptions,
        scheduler.prefix_queries,
        scheduler.prefix_hits,
        scheduler.num_draft_tokens,
        scheduler.num_accepted_tokens,
    )


class _Agreement:
    """Gathers the ranks' statuses by step until all have spoken, and compares them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_step: dict[tuple[int, int | None], list[RankStatus]] = {}

    def add(self, statuses: list[RankStatus]) -> list[Status]:
        """Takes statuses in; returns the answers to reports that are now complete."""
        complete = []
        for status in statuses:
            if status.error is not None:
                raise EngineError(f"rank {status.rank} failed: {status.error}")
            key = (status.step, status.report_id)
            group = self._by_step.setdefault(key, [])
            group.append(status)
            if len(group) < self._size:
                continue
            del self._by_step[key]
            if len({s.checksum for s in group}) > 1:
                sums = ", ".join(f"rank {s.rank}: {s.checksum:08x}" for s in sorted(group, key=lambda s: s.rank))
                raise EngineError(f"the ranks disagree before step {status.step} ({sums})")
            if status.report_id is not None:
                complete.append(Status(status.report_id, sorted(group, key=lambda s: s.rank)))
        return complete
