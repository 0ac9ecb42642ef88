"""Where the device's work is put, so that the host can go on while it is done.

A CUDA stream is such a queue already: kernels are launched and the call returns. A CPU computes in the thread that
asks; so there the device is a thread of its own.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

T = TypeVar("T")


class Job(Generic[T]):
    """Something that the device is to do. A `concurrent.futures.Future` without conditions and callbacks: on a CPU each
    page of code that a step touches has to come from memory, which the weights have just streamed through.

    Args:
        function: does it.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function, self._done = function, threading.Lock()
        self._result: T
        self._error: BaseException | None = None
        self._done.acquire()

    def run(self) -> None:
        """Does it; once."""
        try:
            self._result = self._function()
        except BaseException as e:  # noqa: BLE001 - whoever waits for it raises it
            self._error = e
        del self._function  # which holds a step, that holds this job: a cycle a step, with all that it computed with
        self._done.release()

    def result(self) -> T:
        """Waits; returns what the function returned, or raises what it raised."""
        with self._done:
            if self._error is not None:
                raise self._error
            return self._result


class DeviceQueue(Protocol):
    """Runs jobs one after another, in order."""

    def submit(self, function: Callable[[], T]) -> Job[T]:
        """Puts a job at the end; in inference mode."""
        ...

    def prepare(self, function: Callable[[], T]) -> T:
        """Runs a job where the others will run, without inference mode, and waits: for what comes before serving."""
        ...


class StreamQueue:
    """CUDA: a job only launches kernels, here and now; what it returns may still be under way on the stream."""

    def submit(self, function: Callable[[], T]) -> Job[T]:
        """See `DeviceQueue`."""
        job = Job(function)
        with torch.inference_mode():
            job.run()
        return job

    def prepare(self, function: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        return function()


class ThreadQueue:
    """CPU: a thread that computes, and the only one of the process.

    libgomp's threads wait for each other in a loop for a while before they sleep, so that a step of hundreds of
    parallel loops is not one of hundreds of wake-ups; but not if there are more of them than cores, and every thread
    that computes has a team of its own.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._serves = False
        threading.Thread(target=_run, args=(self._jobs,), name="tpserve-device", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, function: Callable[[], T]) -> Job[T]:
        """See `DeviceQueue`."""
        if not self._serves:  # from here on the thread is in inference mode; to enter it for each job takes 0.1 ms
            self._serves = True
            self._put(torch.inference_mode().__enter__)
        return self._put(function)

    def prepare(self, function: Callable[[], T]) -> T:
        """See `DeviceQueue`."""
        assert not self._serves, "it is for what comes before serving"
        return self._put(function).result()

    def _put(self, function: Callable[[], T]) -> Job[T]:
        job = Job(function)
        self._jobs.put(job)
        return job


def _run(jobs: queue.SimpleQueue[Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # and what it has computed, while this waits for the next


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
    """CUDA: events, each counted from the last one that was read, and the first from one whose time on the host's clock
    is known: differences are float32 milliseconds, of which ten minutes are known to 60 µs only.

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
        self._anchor_ns += round(self._anchor.elapsed_time(mark) * 1e6)
        self._anchor = mark
        return self._anchor_ns


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
