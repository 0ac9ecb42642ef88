"""The engine as other processes see it: submit token ids, get token ids. Starts the rank group and keeps it alive.

A request survives the group it ran on: its prompt, its seed and the tokens already delivered are kept here, and a
relaunched group goes on from there (the next token depends on nothing else).
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tpserve.engine.config import EngineConfig
from tpserve.engine.delivery import Delivery
from tpserve.engine.errors import ConfigError, EngineError, OverloadedError, RequestError
from tpserve.engine.in_flight import NewRequest, Request
from tpserve.engine.limits import check_prompt, check_room, check_sequences, check_vocabulary
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import (
    Add,
    Heartbeat,
    RankTrace,
    Ready,
    Report,
    RequestOutput,
    Status,
    Trace,
)
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.weights import describe_checkpoint
from tpserve.model.checkpoint import CheckpointError


class EngineClient:
    """A rank group and the requests on it. Thread-safe.

    Args:
        config: what to serve and how.

    Attributes:
        checkpoint: what is served.
        metrics: what has happened, for Prometheus.

    Raises:
        ConfigError: the checkpoint cannot be served.
    """

    def __init__(self, config: EngineConfig) -> None:
        try:
            self.checkpoint = describe_checkpoint(Path(config.checkpoint_dir))
        except CheckpointError as e:
            raise ConfigError(str(e)) from None
        self.config = config
        self.metrics = EngineMetrics()
        self._delivery = Delivery(config, self.checkpoint.args, self.metrics)
        self._requests = self._delivery.requests
        self._keeper = self._delivery.keeper
        self._lock = self._keeper.lock

    @property
    def ready(self) -> bool:
        """Whether a group is up; `unhealthy_reason` looks closer."""
        return self._keeper.info is not None

    def unhealthy_reason(self) -> str | None:
        """None: a token can be made now; otherwise why not, in a sentence for operators.

        Says so within two seconds of a fault (later only where the group's own steps take longer). When nobody waits
        for tokens, a probe of one token goes through the group, at most two a second. Waits less than two seconds, and
        not at all in the thread that calls `on_output`.
        """
        return self._delivery.health.unhealthy_reason()

    @property
    def failure(self) -> str | None:
        """Why the engine has given up; None while it has not."""
        return None if self._keeper.failure is None else str(self._keeper.failure)

    @property
    def info(self) -> Ready:
        """What the present group said when it was ready."""
        info = self._keeper.info
        if info is None:
            raise EngineError(self.failure or "the engine is starting")
        return info

    @property
    def heartbeat(self) -> Heartbeat | None:
        """The last one."""
        return self._keeper.heartbeat

    @property
    def num_restarts(self) -> int:
        """Relaunches so far."""
        return self._keeper.num_restarts

    @property
    def pids(self) -> list[int]:
        """The present group's processes: torchrun, its ranks, and what they started."""
        return self._keeper.pids

    @property
    def rank_pids(self) -> list[int]:
        """The present group's ranks."""
        return self._keeper.rank_pids

    @property
    def standby_pids(self) -> list[int]:
        """The processes of the group that waits for the present one's end."""
        return self._keeper.standby_pids

    def start(self) -> Ready:
        """Launches the group and waits until it can make tokens.

        Raises:
            ConfigError: the group says that this configuration or checkpoint cannot be served.
            EngineError: it did not come up.
        """
        try:
            return self._keeper.start()
        except (ConfigError, EngineError):
            self.close()
            raise

    def submit(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Starts a request.

        Args:
            request_id: unique among those in flight.
            prompt_token_ids: at least one, fewer than max_seq_len.
            params: how tokens are chosen; without a seed, one is drawn.
            on_output: called from the client's thread with new tokens; each answer's last output has a finish_reason.
                If it raises, the request is cancelled.
            priority: lower ones go first.
            timeout_s: from now, waiting included; what has not ended then ends with finish_reason "timeout".

        Raises:
            RequestError: the request cannot be served; names the field.
            OverloadedError: too many requests are waiting.
            EngineError: the engine has given up.
        """
        new = NewRequest(request_id, prompt_token_ids, params, on_output)
        self.submit_together([new], priority=priority, timeout_s=timeout_s)

    def submit_together(self, new: Sequence[NewRequest], *, priority: int = 0, timeout_s: float | None = None) -> None:
        """Starts several requests, all of them or none: they are taken in before one and the same step.

        Args:
            new: see `submit`.
            priority, timeout_s: of each; see `submit`.

        Raises:
            RequestError, OverloadedError, EngineError: see `submit`.
        """
        now_s = time.monotonic()
        deadline_s = math.inf if timeout_s is None else now_s + timeout_s
        requests = []
        for request_id, prompt_token_ids, params, on_output in new:
            if params.seed is None:
                params = msgspec.structs.replace(params, seed=secrets.randbits(64))
            self._check(Add(request_id, prompt_token_ids, params, priority=priority))
            requests.append(Request(request_id, prompt_token_ids, params, on_output, priority, now_s, deadline_s))
        with self._lock:
            if self._keeper.failure is not None:
                raise EngineError(f"the engine has given up: {self._keeper.failure}")
            if self._keeper.closing:
                raise EngineError("the engine is shutting down")
            ids: set[str] = set()
            for request in requests:
                if request.request_id in self._requests or request.request_id in ids:
                    raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
                ids.add(request.request_id)
            num_open, limit = len(self._requests), self.config.max_num_seqs + self.config.max_num_waiting
            if num_open + len(requests) > limit:
                retry_after_s = self._requests.retry_after_s(num_open - self.config.max_num_seqs, now_s)
                more = f", {len(requests)} more were asked for together" if len(requests) > 1 else ""
                raise OverloadedError(f"{num_open} requests are in flight, {limit} are admitted{more}", retry_after_s)
            self._delivery.submit(requests)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drops a request, or one of its answers. Unknown ones are ignored.

        `on_output` is not called for it any more, except with a step's tokens that are being handed out right now.
        """
        self._delivery.cancel(request_id, index)

    def status(self, timeout_s: float = 5.0) -> Status:
        """Every rank's state after one and the same step.

        Raises:
            EngineError: no answer within `timeout_s`.
        """
        (status,) = self._keeper.ask(Report, 1, timeout_s)
        assert isinstance(status, Status)
        return status

    def trace(self, num_steps: int, timeout_s: float = 60.0) -> list[RankTrace]:
        """What every rank does in the next steps; see `trace.chrome_trace`.

        Raises:
            EngineError: that many steps were not made within `timeout_s`.
        """
        traces = self._keeper.ask(lambda ask_id: Trace(ask_id, num_steps), None, timeout_s)
        return sorted(traces, key=lambda trace: trace.rank)

    def close(self) -> None:
        """Stops the group and leaves no process; requests in flight end with finish_reason "cancelled"."""
        self._keeper.close()
        self._delivery.end("cancelled", None)

    def _check(self, event: Add) -> None:
        try:
            event.params.validate()
            # Types are looked at when a message is read; rank 0 must not be the first who does.
            msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Add)
        except RequestError:
            raise
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as e:
            raise RequestError(f"the request cannot be sent: {e}") from None
        prompt_token_ids, params = event.prompt_token_ids, event.params
        vocab_size = self.checkpoint.args.vocab_size
        check_prompt(prompt_token_ids, self.config.max_seq_len, vocab_size)
        check_vocabulary(params, vocab_size)
        check_sequences(params, self.config.max_num_seqs)
        info = self._keeper.last_info
        if info is not None:
            check_room(len(prompt_token_ids), params, info.max_seq_len, info.num_blocks, info.block_size)
