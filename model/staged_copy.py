"""Weights from pageable memory to a GPU, through page-locked buffers that several threads fill.

A copy from pageable memory goes through a buffer of the driver's, filled by one thread that waits for the device; of a
mapped file it waits for every page besides. Here every thread that copies has buffers of its own: it fills one while
the device reads the other, and nothing passes from thread to thread. Slabs of columns, which a rank has of some
matrices, are no worse: they are contiguous once they are in a buffer.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

THREADS = 8
_BUFFERS = 2  # of a thread


class _Buffers(threading.local):
    """A thread's own."""

    def __init__(self) -> None:
        self.memory: list[torch.Tensor] = []
        self.read: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self.next = 0


class StagedCopies:
    """Copies that are on their way until `finish`; on a CPU, plain ones. Any thread may make them.

    Args:
        device: of the targets.
        buffer_bytes: of each of a thread's buffers.

    Attributes:
        by_threads: whether several threads had better copy.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = 8 << 20) -> None:
        self.by_threads = device.type == "cuda"
        if device == torch.device("cuda"):  # the current one is each thread's own
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._own, self._size = _Buffers(), buffer_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target = source, in the target's type; the source may be given back at once.

        Args:
            target: on the device.
            source: of the same shape, in ordinary memory.
        """
        row_bytes = source[:1].numel() * source.element_size()
        if not self.by_threads or source.ndim == 0 or row_bytes > self._size:
            target.copy_(source)
            return
        with torch.cuda.device(self._device):
            self.stage(target, source, max(1, self._size // max(1, row_bytes)))

    def stage(self, target: torch.Tensor, source: torch.Tensor, rows: int) -> None:
        """`copy` through this thread's buffers, `rows` rows at a time, which must fit one."""
        for first in range(0, len(source), rows):
            part = source[first : first + rows]
            place = target[first : first + rows]
            staged = self._buffer()[: part.numel() * part.element_size()].view(part.dtype).view(part.shape)
            staged.copy_(part)
            if place.dtype == staged.dtype:
                place.copy_(staged, non_blocking=True)
            else:  # on the device: torch would convert here first
                place.copy_(staged.to(place.device, non_blocking=True))
            self._sent()

    def finish(self) -> None:
        """Waits for the device; no copy may be running."""
        if self.by_threads:
            torch.cuda.synchronize(self._device)

    def _buffer(self) -> torch.Tensor:
        """The buffer that was sent longest ago."""
        own = self._own
        if len(own.memory) < _BUFFERS:
            own.memory.append(torch.empty(self._size, dtype=torch.uint8, pin_memory=self.by_threads))
        event = own.read[own.next]
        if event is not None:
            event.synchronize()
        return own.memory[own.next]

    def _sent(self) -> None:
        own = self._own
        if self.by_threads:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            own.read[own.next] = event
        own.next = (own.next + 1) % _BUFFERS


@contextlib.contextmanager
def weight_threads(lone: bool = True) -> Iterator[ThreadPoolExecutor]:
    """`THREADS` threads that read, check and copy weights. What has not begun when an error comes is not begun.

    Args:
        lone: each works alone: of torch's own threads, each would call for all. Another thread of the process that uses
            torch for the first time meanwhile stays alone, too.
    """
    before = torch.get_num_threads()
    begins = (torch.set_num_threads, (1,)) if lone else (None, ())
    try:
        with ThreadPoolExecutor(THREADS, "tpserve-weights", *begins) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if lone:
            torch.set_num_threads(before)


def in_threads(jobs: Iterable[Callable[[], object]]) -> None:
    """Does the jobs by `weight_threads`; up to twice as many are begun as there are threads.

    Raises:
        Exception: what a job raised; the first one's, if several did.
    """
    left, running = iter(jobs), deque[Future[object]]()
    with weight_threads() as pool:
        while True:
            running.extend(pool.submit(job) for job in itertools.islice(left, 2 * THREADS - len(running)))
            if not running:
                break
            running.popleft().result()
