"""Where the device's work is put, so that the host can go on while it is done.

A CUDA stream is such a queue already: kernels are launched and the call returns. On a CPU there is no other device: the
work waits until its results are asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Result(Protocol):
    """Of a job."""

    def result(self) -> Any:
        """Waits for the job; what it returned, or raises what it, or one before it, raised. Then the queue is over."""
        ...


class DeviceQueue(Protocol):
    """Runs jobs one after another, in order."""

    def submit(self, job: Callable[[], Any]) -> Result:
        """Puts a job at the end."""
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


class HostQueue:
    """CPU: whoever asks for a result computes it, and what was put before it.

    The cores that compute a step are the host's as well, and every loop of a step ends with its slowest thread: what
    the host does meanwhile costs as much as between two steps. A thread of its own for the device costs more: wake-ups
    at each job, and waits for the interpreter's lock between the parts of a step.

    It is always the same thread that asks. libgomp's threads wait for each other in a loop for a while before they
    sleep, so that a step of hundreds of parallel loops is not one of hundreds of wake-ups; but not if there are more of
    them than cores, and every thread that computes has a team of its own.
    """

    def __init__(self) -> None:
        self._jobs: deque[_Deferred] = deque()

    def submit(self, job: Callable[[], Any]) -> Result:
        """See `DeviceQueue`."""
        deferred = _Deferred(self, job)
        self._jobs.append(deferred)
        return deferred

    def prepare(self, job: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        return job()

    def run_next(self) -> None:
        """Does the oldest job that is left."""
        self._jobs.popleft().run()


class _Deferred:
    """A job of a `HostQueue`; a `Result`."""

    def __init__(self, queue: HostQueue, job: Callable[[], Any]) -> None:
        self._queue, self._job, self._done = queue, job, False
        self._value: Any = None

    def run(self) -> None:
        self._value = _in_inference_mode(self._job)
        self._done = True

    def result(self) -> Any:
        while not self._done:
            self._queue.run_next()
        return self._value


def _in_inference_mode(job: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return job()


def device_queue(device: torch.device) -> DeviceQueue:
    """The queue for a device."""
    return StreamQueue() if device.type == "cuda" else HostQueue()


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


class HostClock:
    """CPU: the host's own clock."""

    def mark(self) -> int:
        """See `DeviceClock`."""
        return time.monotonic_ns()

    def read_ns(self, mark: int) -> int:
        """See `DeviceClock`."""
        return mark


def device_clock(device: torch.device) -> DeviceClock:
    """The clock of a device."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
