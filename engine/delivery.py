"""Between the group's keeper and the users: books outputs, hands them out, and says what a new group must be told."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import RequestError
from tpserve.engine.health import Health
from tpserve.engine.in_flight import Request, Requests
from tpserve.engine.keeper import GroupKeeper
from tpserve.engine.limits import check_room
from tpserve.engine.metrics import EngineMetrics
from tpserve.engine.protocol import Cancel, Event, Outputs, Ready, RequestOutput
from tpserve.engine.suspects import Suspects, deaths_to_condemn
from tpserve.model.args import ModelArgs

logger = logging.getLogger(__name__)


class Delivery:
    """The requests, as the keeper sees them; an `Owner`.

    Args:
        config: of the group.
        args: the model's.
        metrics: what happens is counted there.

    Attributes:
        keeper: of the group that works for the requests.
        requests: in flight; guarded by the keeper's lock.
        suspects: which of them are held back; likewise.
        health: whether a token can be made now.
    """

    def __init__(self, config: EngineConfig, args: ModelArgs, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self.suspects = Suspects(config.max_num_seqs, deaths_to_condemn(config.max_restarts))
        self.requests = Requests(metrics, self.suspects)
        self.keeper = GroupKeeper(config, args, metrics, self)
        self.health = Health(self.keeper, lambda: not len(self.requests))
        self._unfit: list[tuple[Request, str]] = []  # for the present group

    def submit(self, requests: Sequence[Request]) -> None:
        """Books requests and sends them together, but those that have to wait for suspects. The lock is held."""
        for request in requests:
            self.requests.add(request)
        self.keeper.send(*(r.event() for r in requests if self.suspects.submitted(r.request_id, r.priority)))

    def cancel(self, request_id: str, index: int | None) -> None:
        """See `EngineClient.cancel`."""
        with self.keeper.lock:
            if self.requests.cancel(request_id, index, time.monotonic()):
                self.keeper.send(Cancel(request_id, index))

    def replay(self, info: Ready) -> list[Event]:
        """What a new group must be told. The lock is held."""
        for request in list(self.requests.all()):
            try:  # a smaller group may have less room
                prompt = len(request.prompt_token_ids)
                check_room(prompt, request.params, info.max_seq_len, info.num_blocks, info.block_size)
            except RequestError as e:
                self.requests.remove(request, "error")
                self._unfit.append((request, str(e)))
        now_s = time.monotonic()
        names = self.suspects.born({r.request_id: r.priority for r in self.requests.all()}, now_s)
        names += self.suspects.due(now_s)
        if self.suspects.num_held:
            logger.warning("%d requests wait until it is known whether the group died of them", self.suspects.num_held)
        return [self.requests[name].event() for name in names]

    def take(self, outputs: Outputs) -> None:
        """Takes one step's tokens."""
        with self.keeper.lock:
            wanted = self.requests.take(self.health.take(outputs), time.monotonic())
            self._send_due(time.monotonic())
        for request, output in wanted:
            self._hand_over(request, output)

    def tick(self, now_s: float) -> None:
        """Called at least every 50 ms."""
        with self.keeper.lock:
            expired = self.requests.expired(now_s)
            for request in expired:
                self.keeper.send(Cancel(request.request_id))
            if self.keeper.info is not None:
                self._send_due(now_s)
            unfit, self._unfit = self._unfit, []
        self._tell(expired, "timeout", None)
        for request, message in unfit:
            self._tell([request], "error", message)

    def stopped(self) -> None:
        """A group is sent nothing any more. The lock is held."""
        self.suspects.stopped()

    def died(self, reason: str) -> int:
        """A group that was ready has ended; returns how many deaths, this one last, were one request's doing."""
        with self.keeper.lock:
            condemned = self.suspects.died()
            if condemned is None:
                return 0
            request = self.requests[condemned.request_id]
            self.requests.remove(request, "error")
            self._metrics.condemned += 1
        message = (
            f"the request was in flight at {condemned.deaths} deaths of the rank group in a row and is not tried "
            f"again; the last: {reason}"
        )
        logger.error("request %s: %s", request.request_id, message)
        self._tell([request], "error", message)
        return condemned.deaths

    def end(self, finish_reason: str, error: str | None) -> None:
        """There will be no further tokens."""
        with self.keeper.lock:
            requests = list(self.requests.all())
            for request in requests:
                self.requests.remove(request, finish_reason)
        self._tell(requests, finish_reason, error)

    def _send_due(self, now_s: float) -> None:
        self.keeper.send(*(self.requests[name].event() for name in self.suspects.due(now_s)))

    def _tell(self, requests: list[Request], finish_reason: str, error: str | None) -> None:
        for request in requests:
            for output in request.last_outputs(finish_reason, error):
                self._hand_over(request, output)

    def _hand_over(self, request: Request, output: RequestOutput) -> None:
        try:
            request.on_output(output)
        except Exception:  # the fault of whoever asked must not become the others'
            logger.exception("request %s: its on_output", request.request_id)
            self.cancel(request.request_id, None)
