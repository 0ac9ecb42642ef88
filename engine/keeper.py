"""Keeps a rank group alive: launches it, listens to it, replaces it when it dies, and gives up when nothing helps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import Event, Failed, Heartbeat, Outputs, RankTrace, Ready, Reply, Status
from tpserve.engine.supervisor import RankGroup

_POLL_S = 0.05

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """Whom the group works for; called from the keeper's thread."""

    def replay(self) -> list[Event]:
        """What a new group must be told. The lock is held."""

    def take(self, outputs: Outputs) -> None:
        """Takes one step's tokens."""

    def tick(self, now_s: float) -> None:
        """Called at least every 50 ms while a group is there."""

    def end(self, finish_reason: str, error: str | None) -> None:
        """There will be no further tokens."""


class GroupKeeper:
    """See the module's text.

    Args:
        config: of the group.
        metrics: told of heartbeats and restarts.
        owner: told of everything else.

    Attributes:
        lock: guards the owner's books as well, so that no event is lost between two groups.
        info: what the present group said when it was ready; None: there is none, or it is not.
        last_info: what the last one said.
        failure: why the keeper has given up.
        closing: no further group is wanted.
        num_restarts: relaunches so far.
    """

    def __init__(self, config: EngineConfig, metrics: EngineMetrics, owner: Owner) -> None:
        self._config, self._metrics, self._owner = config, metrics, owner
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)  # of _group, info, failure, _asked
        self.info: Ready | None = None
        self.last_info: Ready | None = None
        self.failure: EngineError | ConfigError | None = None
        self.heartbeat: Heartbeat | None = None
        self.closing = False
        self.num_restarts = 0
        self._group: RankGroup | None = None
        self._asked: dict[int, list[Any]] = {}  # what the ranks have answered to open questions
        self._next_id = 0
        self._restarts_s: deque[float] = deque()
        # One thread launches, listens and relaunches: the group dies with the thread that made it.
        self._thread = threading.Thread(target=self._run, name="tpserve-engine-client", daemon=True)

    @property
    def pids(self) -> list[int]:
        """The present group's processes."""
        with self.lock:
            return self._group.pids if self._group else []

    def start(self) -> Ready:
        """Launches the first group and waits until it is ready.

        Raises:
            ConfigError, EngineError: the keeper has given up.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self.info is not None or self.failure is not None)
            if self.info is not None:
                return self.info
            assert self.failure is not None
            raise self.failure

    def close(self) -> None:
        """Stops the group and leaves no process."""
        self.closing = True
        if self._thread.is_alive():
            self._thread.join()

    def send(self, event: Event) -> None:
        """Tells the group, if one is ready; the next is told what counts by `replay`. Callers hold the lock."""
        if self._group is not None and self.info is not None:
            self._group.send(event)

    def ask(self, question: Callable[[int], Event], num_answers: int, timeout_s: float) -> list[Any]:
        """Sends `question(id)` and waits for the answers with that id.

        Raises:
            EngineError: there is no group, it ended, or the answers did not come.
        """
        with self._changed:
            if self._group is None or self.info is None:
                raise EngineError("the engine is starting" if self.failure is None else str(self.failure))
            group, ask_id = self._group, self._next_id
            self._next_id += 1
            answers = self._asked[ask_id] = []
            try:
                group.send(question(ask_id))
                self._changed.wait_for(lambda: len(answers) == num_answers or self._group is not group, timeout_s)
            finally:
                del self._asked[ask_id]
            if self._group is not group:
                raise EngineError("the rank group ended before it answered")
            if len(answers) < num_answers:
                raise EngineError(f"the ranks did not answer within {timeout_s:g} s")
            return answers

    # What follows runs in the keeper's thread.

    def _run(self) -> None:
        while not self.closing and self.failure is None:
            reason: EngineError | ConfigError | None
            try:
                group = RankGroup(self._config)
            except Exception as e:  # no disk, no process, a path too long for a socket
                logger.exception("launching the rank group")
                self._after_failure(EngineError(f"the rank group could not be launched: {e}"))
                continue
            with self.lock:
                self._group = group
            try:
                reason = self._serve(group)
            except Exception as e:  # the thread must outlive its mistakes, or every request would hang
                logger.exception("engine client")
                reason = EngineError(f"engine client: {e!r}")
            with self._changed:
                self._group, self.info = None, None
                self._changed.notify_all()
            self._metrics.group_ended()
            if reason is None:
                group.stop()
                return
            group.kill()
            self._after_failure(reason)

    def _serve(self, group: RankGroup) -> EngineError | ConfigError | None:
        """Listens until the group fails (returns why) or the keeper closes (returns None)."""
        heard_s = time.monotonic()
        while not self.closing:
            replies = group.receive(_POLL_S)
            now_s = time.monotonic()
            if replies:
                heard_s = now_s
            for reply in replies:
                if isinstance(reply, Failed):
                    return ConfigError(reply.message)
                self._take(group, reply)
            self._owner.tick(now_s)
            ready = self.info is not None
            limit_s = self._config.step_timeout_s if ready else self._config.start_timeout_s
            if group.exit_status is not None:
                return EngineError(f"the rank group ended with status {group.exit_status}")
            if now_s - heard_s > limit_s:
                state = "step" if ready else "start"
                return EngineError(f"the rank group was silent for {limit_s:g} s ({state}_timeout_s)")
        return None

    def _take(self, group: RankGroup, reply: Reply) -> None:
        match reply:
            case Outputs():
                self._owner.take(reply)
            case Ready():
                logger.info("the rank group is ready: pids %s", group.pids)
                with self._changed:
                    for event in self._owner.replay():
                        group.send(event)
                    self.info = self.last_info = reply
                    self._changed.notify_all()
            case Heartbeat():
                self.heartbeat = reply
                if self.info is not None:
                    self._metrics.heard(reply, self.info.num_blocks)
            case Status(report_id):
                self._answer(report_id, reply)
            case RankTrace(trace_id):
                self._answer(trace_id, reply)

    def _answer(self, ask_id: int, answer: Status | RankTrace) -> None:
        with self._changed:
            if ask_id in self._asked:  # otherwise it comes too late
                self._asked[ask_id].append(answer)
                self._changed.notify_all()

    def _after_failure(self, reason: EngineError | ConfigError) -> None:
        """Gives up, or lets `_run` launch another group."""
        now_s = time.monotonic()
        self._restarts_s.append(now_s)
        while now_s - self._restarts_s[0] > self._config.restart_window_s:
            self._restarts_s.popleft()
        if isinstance(reason, EngineError) and len(self._restarts_s) <= self._config.max_restarts:
            self.num_restarts += 1
            self._metrics.restarts += 1
            logger.error("%s; relaunching (%d of %d)", reason, len(self._restarts_s), self._config.max_restarts)
            return
        logger.error("%s; giving up", reason)
        with self._changed:
            self.failure = reason
            self._changed.notify_all()
        self._owner.end("error", str(reason))
