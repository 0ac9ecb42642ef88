"""Where the device's work is put, so that the host can go on while it is done.

A CUDA stream is such a queue already: kernels are launched and the call returns. A CPU computes in the thread that
asks; so there the device is a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class DeviceQueue(Protocol):
    """Runs jobs one after another, in order."""

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Puts a job at the end; the future holds what it returned or raised."""
        ...

    def prepare(self, job: Callable[[], T]) -> T:
        """Runs a job where the others will run, without inference mode, and waits: for what comes before serving."""
        ...


class StreamQueue:
    """CUDA: a job only launches kernels, here and now; what it returns may still be under way on the stream."""

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """See `DeviceQueue`."""
        future: Future[Any] = Future()
        future.set_result(_in_inference_mode(job))
        return future

    def prepare(self, job: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        return job()


class ThreadQueue:
    """CPU: a thread that computes, and the only one of the process.

    libgomp's threads wait for each other in a loop for a while before they sleep, so that a step of hundreds of
    parallel loops is not one of hundreds of wake-ups; but not if there are more of them than cores, and every thread
    that computes has a team of its own.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tpserve-device")
        self._serves = False

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """See `DeviceQueue`."""
        if not self._serves:  # from here on the thread is in inference mode; to enter it for each job takes 0.1 ms
            self._serves = True
            self._thread.submit(torch.inference_mode().__enter__)
        return self._thread.submit(job)

    def prepare(self, job: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        assert not self._serves, "it is for what comes before serving"
        return self._thread.submit(job).result()


def _in_inference_mode(job: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return job()


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue for a device."""
    return StreamQueue() if device.type == "cuda" else ThreadQueue()


class DeviceClock(Protocol):
    """Tells when the device reached a point of its queue."""

    def mark(self) -> Any:
        """Marks this point; called by a job."""
        ...

    def read_ns(self, mark: Any) -> int:
        """When the device was there, on the machine's monotonic clock; the caller has waited for it."""
        ...


class StreamClock:
    """CUDA: events, counted from one whose time on the host's clock is known.

    Args:
        device: whose stream.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._anchor = self.mark()
            self._anchor.synchronize()
        self._anchor_ns = time.monotonic_ns()

    def mark(self) -> Any:
        """See `DeviceClock`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read_ns(self, mark: Any) -> int:
        """See `DeviceClock`."""
        return self._anchor_ns + int(self._anchor.elapsed_time(mark) * 1e6)


class ThreadClock:
    """CPU: the thread's own clock."""

    def mark(self) -> int:
        """See `DeviceClock`."""
        return time.monotonic_ns()

    def read_ns(self, mark: int) -> int:
        """See `DeviceClock`."""
        return mark


def device_clock(device: torch.device) -> DeviceClock:
    """The clock of a device."""
    return StreamClock(device) if device.type == "cuda" else ThreadClock()
