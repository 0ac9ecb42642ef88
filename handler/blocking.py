"""Classic batches: TorchServe waits for the whole batch, as with the old example's yaml. Nothing streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpserve.handler.backend import Backend
from tpserve.handler.open_request import Pending
from tpserve.handler.replies import Reply
from tpserve.handler.torchserve import Context, put_reply


def handle_batch(backend: Backend, data: Sequence[Mapping[str, Any]], context: Context) -> list[bytes]:
    """Answers every request of a batch; each gets its own status."""
    results = [b""] * len(data)
    waiting: dict[int, Pending] = {}
    for index, request_id in context.request_ids.items():
        opened = backend.open(request_id, data[index], context.get_all_request_header(index), stream=False)
        if isinstance(opened, Reply):
            results[index] = put_reply(context, index, opened)
        else:
            waiting[index] = opened
    while waiting:
        for index, pending in list(waiting.items()):
            reply = pending.take()
            if reply is not None:
                results[index] = put_reply(context, index, reply)
                backend.cancel(waiting.pop(index))
        if waiting:
            backend.signal.wait()
            backend.signal.clear()
    return results


class Batches:
    """`handle_batch`, and how many requests it is at.

    Args:
        backend: opens and cancels requests.

    Attributes:
        num_open: requests of the batch that has not been answered.
    """

    def __init__(self, backend: Backend) -> None:
        self.num_open = 0
        self._backend = backend

    def handle(self, data: Sequence[Mapping[str, Any]], context: Context) -> list[bytes]:
        """One call of TorchServe."""
        self.num_open = len(data)
        try:
            return handle_batch(self._backend, data, context)
        finally:
            self.num_open = 0
