"""The engine as other processes see it: submit token ids, get token ids. Starts the rank group and keeps it alive.

A request survives the group it ran on: its prompt, its seed and the tokens already delivered are kept here, and a
relaunched group goes on from there (the next token depends on nothing else).
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError, OverloadedError, RequestError
from tpserve.engine.protocol import (
    Add,
    Cancel,
    Failed,
    Heartbeat,
    Outputs,
    Ready,
    Reply,
    Report,
    RequestOutput,
    Status,
)
from tpserve.engine.requests import check_prompt
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup
from tpserve.model.checkpoint import CheckpointError, CheckpointInfo

_POLL_S = 0.05

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _InFlight:
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    on_output: Callable[[RequestOutput], None]
    output_token_ids: list[int] = dataclasses.field(default_factory=list)

    def event(self) -> Add:
        return Add(self.request_id, self.prompt_token_ids, self.params, self.output_token_ids)


class EngineClient:
    """A rank group and the requests on it. Thread-safe.

    Args:
        config: what to serve and how.

    Raises:
        ConfigError: the checkpoint folder cannot be served.
    """

    def __init__(self, config: EngineConfig) -> None:
        try:
            self.checkpoint = CheckpointInfo.read(Path(config.checkpoint_dir))
        except CheckpointError as e:
            raise ConfigError(str(e)) from None
        self.config = config
        self.heartbeat: Heartbeat | None = None
        self.num_restarts = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # of _info, _failure, _statuses
        self._in_flight: dict[str, _InFlight] = {}
        self._statuses: dict[int, Status] = {}
        self._next_report_id = 0
        self._group: RankGroup | None = None
        self._info: Ready | None = None
        self._failure: EngineError | ConfigError | None = None
        self._closing = False
        self._restarts_s: deque[float] = deque()
        # One thread launches, listens and relaunches: the group dies with the thread that made it.
        self._thread = threading.Thread(target=self._run, name="tpserve-engine-client", daemon=True)

    @property
    def ready(self) -> bool:
        """Whether a group is up and can make tokens."""
        return self._info is not None

    @property
    def failure(self) -> str | None:
        """Why the engine has given up; None while it has not."""
        return None if self._failure is None else str(self._failure)

    @property
    def info(self) -> Ready:
        """What the present group said when it was ready."""
        if self._info is None:
            raise EngineError(self.failure or "the engine is starting")
        return self._info

    @property
    def pids(self) -> list[int]:
        """The present group's processes."""
        with self._lock:
            return self._group.pids if self._group else []

    def start(self) -> Ready:
        """Launches the group and waits until it can make tokens.

        Raises:
            ConfigError: the group says that this configuration or checkpoint cannot be served.
            EngineError: it did not come up.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._info is not None or self._failure is not None)
            if self._info is not None:
                return self._info
            assert self._failure is not None
            failure = self._failure
        self.close()
        raise failure

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
    ) -> None:
        """Starts a request.

        Args:
            request_id: unique among those in flight.
            prompt_token_ids: at least one, fewer than max_seq_len.
            params: how tokens are chosen; without a seed, one is drawn.
            on_output: called from the client's thread with new tokens; the last call has a finish_reason.

        Raises:
            RequestError: the request cannot be served; names the field.
            OverloadedError: too many requests are waiting.
            EngineError: the engine has given up.
        """
        params.validate()
        check_prompt(prompt_token_ids, self.config.max_seq_len, self.checkpoint.args.vocab_size)
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(64))
        request = _InFlight(request_id, prompt_token_ids, params, on_output)
        with self._lock:
            if self._failure is not None:
                raise EngineError(f"the engine has given up: {self._failure}")
            if self._closing:
                raise EngineError("the engine is shutting down")
            if request_id in self._in_flight:
                raise RequestError(f"request id {request_id!r} is in use", field="request_id")
            limit = self.config.max_num_seqs + self.config.max_num_waiting
            if len(self._in_flight) >= limit:
                raise OverloadedError(f"{len(self._in_flight)} requests are in flight, {limit} are admitted")
            self._in_flight[request_id] = request
            if self._group is not None and self._info is not None:
                self._group.send(request.event())

    def cancel(self, request_id: str) -> None:
        """Drops a request; `on_output` is not called for it any more. Unknown ids are ignored."""
        with self._lock:
            if self._in_flight.pop(request_id, None) and self._group is not None and self._info is not None:
                self._group.send(Cancel(request_id))

    def status(self, timeout_s: float = 5.0) -> Status:
        """Every rank's state after one and the same step.

        Raises:
            EngineError: no answer within `timeout_s`.
        """
        with self._changed:
            report_id = self._next_report_id
            self._next_report_id += 1
            if self._group is None or self._info is None:
                raise EngineError(self.failure or "the engine is starting")
            self._group.send(Report(report_id))
            if not self._changed.wait_for(lambda: report_id in self._statuses, timeout_s):
                raise EngineError(f"the ranks did not report within {timeout_s:g} s")
            return self._statuses.pop(report_id)

    def close(self) -> None:
        """Stops the group and leaves no process; requests in flight end with finish_reason "cancelled"."""
        self._closing = True
        if self._thread.is_alive():
            self._thread.join()
        self._end_all("cancelled", None)

    # What follows runs in the client's thread.

    def _run(self) -> None:
        while not self._closing and self._failure is None:
            reason: EngineError | ConfigError | None
            try:
                group = RankGroup(self.config)
            except Exception as e:  # no disk, no process, a path too long for a socket
                logger.exception("launching the rank group")
                self._after_failure(EngineError(f"the rank group could not be launched: {e}"))
                continue
            with self._lock:
                self._group = group
            try:
                reason = self._serve(group)
            except Exception as e:  # the thread must outlive its mistakes, or every request would hang
                logger.exception("engine client")
                reason = EngineError(f"engine client: {e!r}")
            with self._changed:
                self._group, self._info = None, None
            if reason is None:
                group.stop()
                return
            group.kill()
            self._after_failure(reason)

    def _serve(self, group: RankGroup) -> EngineError | ConfigError | None:
        """Listens until the group fails (returns why) or the client closes (returns None)."""
        heard_s = time.monotonic()
        while not self._closing:
            replies = group.receive(_POLL_S)
            now_s = time.monotonic()
            if replies:
                heard_s = now_s
            for reply in replies:
                if isinstance(reply, Failed):
                    return ConfigError(reply.message)
                self._take(group, reply)
            limit_s = self.config.step_timeout_s if self.ready else self.config.start_timeout_s
            if group.exit_status is not None:
                return EngineError(f"the rank group ended with status {group.exit_status}")
            if now_s - heard_s > limit_s:
                state = "step" if self.ready else "start"
                return EngineError(f"the rank group was silent for {limit_s:g} s ({state}_timeout_s)")
        return None

    def _take(self, group: RankGroup, reply: Reply) -> None:
        match reply:
            case Ready():
                logger.info("the rank group is ready: pids %s", group.pids)
                with self._changed:
                    for request in self._in_flight.values():
                        group.send(request.event())
                    self._info = reply
                    self._changed.notify_all()
            case Heartbeat():
                self.heartbeat = reply
            case Status(report_id):
                with self._changed:
                    self._statuses[report_id] = reply
                    self._changed.notify_all()
            case Outputs(outputs):
                for output in outputs:
                    self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        with self._lock:
            request = self._in_flight.get(output.request_id)
            if request is None:  # cancelled meanwhile
                return
            request.output_token_ids += output.token_ids
            if output.finish_reason is not None:
                del self._in_flight[output.request_id]
        request.on_output(output)

    def _after_failure(self, reason: EngineError | ConfigError) -> None:
        """Gives up, or lets `_run` launch another group."""
        now_s = time.monotonic()
        self._restarts_s.append(now_s)
        while now_s - self._restarts_s[0] > self.config.restart_window_s:
            self._restarts_s.popleft()
        if isinstance(reason, EngineError) and len(self._restarts_s) <= self.config.max_restarts:
            self.num_restarts += 1
            logger.error("%s; relaunching (%d of %d)", reason, len(self._restarts_s), self.config.max_restarts)
            return
        logger.error("%s; giving up", reason)
        with self._changed:
            self._failure = reason
            self._changed.notify_all()
        self._end_all("error", str(reason))

    def _end_all(self, finish_reason: str, error: str | None) -> None:
        with self._lock:
            requests, self._in_flight = list(self._in_flight.values()), {}
        for request in requests:
            request.on_output(RequestOutput(request.request_id, [], None, finish_reason, error))
