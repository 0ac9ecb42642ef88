"""Where the device's work is put, so that the host can go on while it is done.

A CUDA stream is such a queue already: kernels are launched and the call returns. A CPU computes in the thread that
asks; so there the device is a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

import torch


class DeviceQueue(Protocol):
    """Runs jobs one after another, in order."""

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Puts a job at the end; the future holds what it returned or raised."""
        ...


class StreamQueue:
    """CUDA: a job only launches kernels, here and now; what it returns may still be under way on the stream."""

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """See `DeviceQueue`."""
        future: Future[Any] = Future()
        with torch.inference_mode():
            future.set_result(job())
        return future


class ThreadQueue:
    """CPU: a thread that computes."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="tpserve-device", daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """See `DeviceQueue`."""
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as e:  # noqa: BLE001  # whoever waits for the result must hear of it
                future.set_exception(e)
            del job, future  # or the last step's tensors would live until the next


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue for a device."""
    return StreamQueue() if device.type == "cuda" else ThreadQueue()
