"""Continuous batching as TorchServe does it: `handle` is called again and again with the ids of all open requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.handler.backend import Backend
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply
from tpserve.handler.torchserve import Context, put_reply

# With nothing to say, `handle` returns after this; only then can TorchServe hand over new requests.
_POLL_S = 0.02
# The engine's outputs of one step arrive one by one; this much later they are all there.
_GATHER_S = 0.001
# TorchServe does not call at all when the last client has gone.
_ABANDONED_S = 3.0

logger = logging.getLogger(__name__)


class Mailbox:
    """The open requests, between TorchServe's calls.

    Args:
        backend: opens and cancels requests.
        abandoned_s: without a call for so long, all open requests are cancelled.
    """

    def __init__(self, backend: Backend, abandoned_s: float = _ABANDONED_S) -> None:
        self._backend = backend
        self._abandoned_s = abandoned_s
        self._lock = threading.Lock()
        self._open: dict[str, Pending] = {}
        self._called_s = time.monotonic()
        self._abandoned = False  # nobody called for long, and what is open has been cancelled
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._watch_calls, name="tpserve-mailbox-watch", daemon=True)
        self._watch.start()

    @property
    def num_open(self) -> int:
        """Requests that have not been answered."""
        return len(self._open)

    def close(self) -> None:
        """Stops the watch."""
        self._closed.set()
        self._watch.join()

    def handle(self, data: Sequence[Mapping[str, Any]], context: Context) -> list[bytes]:
        """One call: admits new ids, cancels vanished ones, and returns what is ready.

        Ids without news are taken out of `context.request_ids`, which leaves them out of this reply.
        """
        with self._lock:
            context.stopping_criteria = {}
            ids = dict(context.request_ids)
            self._cancel_vanished(set(ids.values()))
            replies: dict[int, Reply] = {}
            for index, request_id in ids.items():
                if request_id not in self._open:
                    opened = self._backend.open(request_id, data[index], context.get_all_request_header(index))
                    if isinstance(opened, Reply):
                        replies[index] = opened
                    else:
                        self._open[request_id] = opened
            if not replies:  # a refusal does not wait for others' tokens
                self._wait()
            results = [b""] * len(data)
            for index, request_id in ids.items():
                reply = replies.get(index) or self._take(request_id)
                if reply is None:
                    del context.request_ids[index]
                else:
                    results[index] = put_reply(context, index, reply)
            self._called_s, self._abandoned = time.monotonic(), False
            return results

    def _wait(self) -> None:
        signal = self._backend.signal
        if signal.wait(_POLL_S) and len(self._open) > 1:
            time.sleep(_GATHER_S)
        signal.clear()  # before looking: what arrives from now on sets it again

    def _take(self, request_id: str) -> Reply | None:
        pending = self._open[request_id]
        reply = pending.take()
        if reply is not None and not reply.more:
            del self._open[request_id]
            self._backend.cancel(pending)  # one of several prompts may have failed while others go on
        return reply

    def _cancel_vanished(self, present: set[str]) -> None:
        for request_id in self._open.keys() - present:
            logger.info("the client of request %s has gone", request_id)
            self._backend.cancel(self._open.pop(request_id))

    def _watch_calls(self) -> None:
        while not self._closed.wait(self._abandoned_s / 4):
            with self._lock:
                if self._open and time.monotonic() - self._called_s > self._abandoned_s:
                    self._abandon()

    def _abandon(self) -> None:
        self._called_s = time.monotonic()
        if self._abandoned:
            self._open.clear()
            return
        logger.info("no call for %g s: cancelling %d requests", self._abandoned_s, len(self._open))
        self._abandoned = True
        for pending in self._open.values():
            self._backend.cancel(pending)
            pending.fail("the server stopped asking for this request")  # its answer, should TorchServe come back
