"""Keeps a rank group alive: launches it, listens to it, replaces it when it dies, and gives up when nothing helps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tpserve.engine.config import EngineConfig
from tpserve.engine.elastic import TensorParallelSize
from tpserve.engine.errors import ConfigError, EngineError, MissingDevicesError
from tpserve.engine.health import Freshness
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.owner import Owner
from tpserve.engine.protocol import Event, Failed, Heartbeat, Outputs, RankTrace, Ready, Reply, Status
from tpserve.engine.recovery import Recovery
from tpserve.engine.restarts import Restarts
from tpserve.engine.standby import Group, Standby
from tpserve.model.args import ModelArgs

_POLL_S = 0.05
_LAST_WORDS_S = 2.0  # a rank of a starting group ended: rank 0 may be about to say why

logger = logging.getLogger(__name__)


class GroupKeeper:
    """See the module's text.

    Args:
        config: of the group.
        args: the model's.
        metrics: told of heartbeats and restarts.
        owner: told of everything else.

    Attributes:
        lock: guards the owner's books as well, so that no event is lost between two groups.
        changed: a condition on it: info, failure, or the answer to a question has changed.
        info: what the present group said when it was ready; None: there is none, or it is not.
        last_info: what the last one said.
        last_reason: why the last one ended.
        failure: why the keeper has given up.
        num_restarts: relaunches so far.
        freshness: when the present group was last heard.
    """

    def __init__(self, config: EngineConfig, args: ModelArgs, metrics: EngineMetrics, owner: Owner) -> None:
        self._config, self._metrics, self._owner = config, metrics, owner
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.info: Ready | None = None
        self.last_info: Ready | None = None
        self.last_reason: str | None = None
        self.failure: EngineError | ConfigError | None = None
        self.heartbeat: Heartbeat | None = None
        self.num_restarts = 0
        self.freshness = Freshness()
        self._closing = threading.Event()
        self._group: Group | None = None
        self._asked: dict[int, list[Any]] = {}  # what the ranks have answered to open questions
        self._next_id = 0
        self._restarts = Restarts(config.max_restarts, config.restart_window_s)
        self._size = TensorParallelSize(args, config.tensor_parallel_size, config.elastic)
        # With no relaunch there is nothing to stand by for.
        self._standby = Standby(config.standby and config.max_restarts > 0)
        self._recovery = Recovery(metrics)
        # One thread launches, listens and relaunches: the group dies with the thread that made it.
        self._thread = threading.Thread(target=self._run, name="tpserve-engine-client", daemon=True)

    @property
    def closing(self) -> bool:
        """No further group is wanted."""
        return self._closing.is_set()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs in the thread that delivers outputs."""
        return threading.current_thread() is self._thread

    @property
    def pids(self) -> list[int]:
        """The present group's processes."""
        with self.lock:
            return self._group.pids if self._group else []

    @property
    def rank_pids(self) -> list[int]:
        """The present group's ranks."""
        with self.lock:
            return self._group.rank_pids if self._group else []

    @property
    def standby_pids(self) -> list[int]:
        """The processes of the group that waits for the present one's end."""
        return self._standby.pids

    def start(self) -> Ready:
        """Launches the first group and waits until it is ready.

        Raises:
            ConfigError, EngineError: the keeper has given up.
        """
        self._thread.start()
        with self.changed:
            self.changed.wait_for(lambda: self.info is not None or self.failure is not None)
            if self.info is not None:
                return self.info
            assert self.failure is not None
            raise self.failure

    def close(self) -> None:
        """Stops the groups and leaves no process."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def send(self, *events: Event) -> None:
        """Tells the group, if one is ready; the next is told what counts by `replay`. Callers hold the lock."""
        if self._group is not None and self.info is not None:
            self._group.send(*events)

    def ask(self, question: Callable[[int], Event], num_answers: int | None, timeout_s: float) -> list[Any]:
        """Sends `question(id)` and waits for the answers with that id; `num_answers` None: one a rank.

        Raises:
            EngineError: there is no group, it ended, or the answers did not come.
        """
        with self.changed:
            if self._group is None or self.info is None:
                raise EngineError("the engine is starting" if self.failure is None else str(self.failure))
            group, ask_id = self._group, self._next_id
            wanted = self.info.tensor_parallel_size if num_answers is None else num_answers
            self._next_id += 1
            answers = self._asked[ask_id] = []
            try:
                group.send(question(ask_id))
                self.changed.wait_for(lambda: len(answers) == wanted or self._group is not group, timeout_s)
            finally:
                del self._asked[ask_id]
            if self._group is not group:
                raise EngineError("the rank group ended before it answered")
            if len(answers) < wanted:
                raise EngineError(f"the ranks did not answer within {timeout_s:g} s")
            return answers

    # What follows runs in the keeper's thread.

    def _run(self) -> None:
        try:
            while not self.closing and self.failure is None:
                self._one_life()
        finally:
            self._standby.close()

    def _one_life(self) -> None:
        try:
            group = self._standby.take(self._next_config())
        except Exception as e:  # no disk, no process, a path too long for a socket
            logger.exception("launching the rank group")
            self._after_failure(EngineError(f"the rank group could not be launched: {e}"), None)
            return
        with self.lock:
            self._group = group
        reason: EngineError | ConfigError | None
        try:
            reason = self._serve(group)
        except Exception as e:  # the thread must outlive its mistakes, or every request would hang
            logger.exception("engine client")
            reason = EngineError(f"engine client: {e!r}")
        with self.changed:
            served_s = None if self.info is None else time.monotonic() - self.freshness.since_s
            self._group, self.info = None, None
            self.last_reason = None if reason is None else str(reason)
            self._owner.stopped()
            self.changed.notify_all()
        self._metrics.group_ended()
        if reason is None:
            group.stop()
            return
        self._recovery.died(time.monotonic())
        group.kill()
        self._after_failure(reason, served_s)

    def _next_config(self) -> EngineConfig:
        changes: dict[str, Any] = {"tensor_parallel_size": self._size.size}
        if self.last_info is not None:  # a group that has lost its GPUs must not go on as one of CPUs
            changes["device"] = self.last_info.device.partition(":")[0]
            # What a group has passed its successor need not: users are waiting.
            moved = self._size.size != self.last_info.tensor_parallel_size
            changes["self_test"] = self._config.self_test and moved
        return msgspec.structs.replace(self._config, **changes)

    def _serve(self, group: Group) -> EngineError | ConfigError | None:
        """Listens until the group fails (returns why) or the keeper closes (returns None)."""
        heard_s = looked_s = time.monotonic()
        ended_s: float | None = None
        while not self.closing:
            replies = group.receive(_POLL_S)
            now_s = time.monotonic()
            if replies:
                heard_s = now_s
                self.freshness.heard(now_s)
            for reply in replies:
                if isinstance(reply, Failed):
                    if reply.num_devices is not None:
                        return MissingDevicesError(reply.message, reply.num_devices)
                    return ConfigError(reply.message)
                if isinstance(reply, Ready) and self.last_info and reply.checkpoint != self.last_info.checkpoint:
                    # Streams would go on in another model's words.
                    return ConfigError("the checkpoint was replaced while it was served; start the server again")
                self._take(group, reply)
            if replies and now_s - looked_s < _POLL_S:
                continue  # what follows is not for every token
            looked_s = now_s
            self._owner.tick(now_s)
            ready = self.info is not None
            if group.death is not None:
                # One more look at least: what rank 0 said before it ended may just have arrived.
                if ready or (
                    ended_s is not None and (group.exit_status is not None or now_s - ended_s > _LAST_WORDS_S)
                ):
                    return EngineError(group.death)
                ended_s = ended_s or now_s
                self._closing.wait(_POLL_S)
                continue
            what = "step_timeout_s" if ready else "start_timeout_s"
            if now_s - heard_s > (limit_s := getattr(self._config, what)):
                return EngineError(f"the rank group was silent for {limit_s:g} s ({what})")
            if ready:
                self._standby.tend(self._next_config())
        return None

    def _take(self, group: Group, reply: Reply) -> None:
        match reply:
            case Outputs():
                self._owner.take(reply)
                if self._recovery.awaits_token and any(output.token_ids for output in reply.outputs):
                    self._recovery.token(time.monotonic())
            case Ready():
                self._ready(group, reply)
            case Heartbeat():
                self.heartbeat = reply
                if self.info is not None:
                    self._metrics.heard(reply, self.info.num_blocks)
            case Status(report_id):
                self._answer(report_id, reply)
            case RankTrace(trace_id):
                self._answer(trace_id, reply)

    def _ready(self, group: Group, info: Ready) -> None:
        now_s = time.monotonic()
        logger.info("the rank group is ready: %d ranks, pids %s", info.tensor_parallel_size, group.pids)
        self._size.served()
        self._metrics.tensor_parallel_size = info.tensor_parallel_size
        with self.changed:
            self.freshness.begin(now_s)
            events = self._owner.replay(info)
            group.send(*events)
            self.info = self.last_info = info
            self.changed.notify_all()
        self._recovery.ready(now_s, len(events))

    def _answer(self, ask_id: int, answer: Status | RankTrace) -> None:
        with self.changed:
            if ask_id in self._asked:  # otherwise it comes too late
                self._asked[ask_id].append(answer)
                self.changed.notify_all()

    def _after_failure(self, reason: EngineError | ConfigError, served_s: float | None) -> None:
        """Gives up, or waits as long as it should and lets `_run` launch another group."""
        now_s = time.monotonic()
        if isinstance(reason, MissingDevicesError) and self._size.devices_missing(reason.num_devices):
            logger.error("%s; going on with %d ranks", reason, self._size.size)
            return
        self._restarts.died(now_s, served_s or 0.0)
        if served_s is not None:
            self._restarts.forgive(now_s, self._owner.died(str(reason)))
        elif isinstance(reason, EngineError) and self._size.failed_to_start():
            logger.error("the rank group does not come back; going on with %d ranks", self._size.size)
        wait_s = None if isinstance(reason, ConfigError) else self._restarts.wait_s()
        if wait_s is None:
            logger.error("%s; giving up", reason)
            with self.changed:
                self.failure = reason
                self.changed.notify_all()
            self._owner.end("error", str(reason))
            return
        self.num_restarts += 1
        self._metrics.restarts += 1
        count, limit = self._restarts.count, self._config.max_restarts
        logger.error("%s; relaunching in %g s (%d of %d)", reason, wait_s, count, limit)
        while not self._closing.wait(min(_POLL_S, max(0.0, now_s + wait_s - time.monotonic()))):
            if time.monotonic() >= now_s + wait_s:
                return
            self._owner.tick(time.monotonic())
