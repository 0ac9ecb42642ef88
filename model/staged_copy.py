"""Weights from pageable memory to a GPU: threads fill one page-locked buffer while the device reads the other.

A copy from pageable memory goes through a buffer of the driver's, filled by one thread that waits for the device; of a
mapped file it waits for every page besides. Slabs of columns, which a rank has of some matrices, are no worse: they are
contiguous once they are in the buffer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

_BUFFERS, _THREADS = 2, 8


class StagedCopies:
    """Copies that are on their way until `finish`; on a CPU, plain ones.

    Args:
        device: of the targets.
        buffer_bytes: of each of the buffers.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = 64 << 20) -> None:
        self._device, self._gpu = device, device.type == "cuda"
        self._buffers: list[torch.Tensor] = []
        self._read: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._next, self._size = 0, buffer_bytes
        self._pool = ThreadPoolExecutor(_THREADS, "tpserve-staging")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        self._pool.shutdown()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """target = source, in the target's type; the source may be given back at once.

        Args:
            target: on the device.
            source: of the same shape, in ordinary memory.
        """
        row_bytes = source[:1].numel() * source.element_size()
        if not self._gpu or source.ndim == 0 or row_bytes > self._size:
            target.copy_(source)
            return
        self.stage(target, source, max(1, self._size // max(1, row_bytes)))

    def stage(self, target: torch.Tensor, source: torch.Tensor, rows: int) -> None:
        """`copy` through the buffers, `rows` rows at a time, which must fit one."""
        for first in range(0, len(source), rows):
            part = source[first : first + rows]
            place = target[first : first + rows]
            staged = self._buffer()[: part.numel() * part.element_size()].view(part.dtype).view(part.shape)
            self._fill(staged, part)
            if place.dtype == staged.dtype:
                place.copy_(staged, non_blocking=True)
            else:  # on the device: torch would convert here first, with one thread
                place.copy_(staged.to(place.device, non_blocking=True))
            self._sent()

    def read_and_copy(self, slabs: Sequence[tuple[torch.Tensor, Callable[[], torch.Tensor]]]) -> None:
        """`copy` of what is read; for a GPU, threads read the next slabs meanwhile.

        Args:
            slabs: targets, and what reads their sources into new memory.
        """
        reads = [read for _, read in slabs]
        sources = read_ahead(reads, _THREADS) if self._gpu else (read() for read in reads)
        with contextlib.closing(sources):
            for target, _ in slabs:
                self.copy(target, next(sources))

    def finish(self) -> None:
        """Waits for the device."""
        for event in self._read:
            if event is not None:
                event.synchronize()

    def _buffer(self) -> torch.Tensor:
        """The buffer that was sent longest ago."""
        if len(self._buffers) < _BUFFERS:
            self._buffers.append(torch.empty(self._size, dtype=torch.uint8, pin_memory=self._gpu))
        event = self._read[self._next]
        if event is not None:
            event.synchronize()
        return self._buffers[self._next]

    def _fill(self, staged: torch.Tensor, part: torch.Tensor) -> None:
        pairs = zip(staged.tensor_split(_THREADS), part.tensor_split(_THREADS), strict=True)
        for _ in self._pool.map(lambda pair: pair[0].copy_(pair[1]), pairs):
            pass

    def _sent(self) -> None:
        if self._gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._read[self._next] = event
        self._next = (self._next + 1) % _BUFFERS


def read_ahead(reads: Sequence[Callable[[], torch.Tensor]], threads: int) -> Generator[torch.Tensor]:
    """What the calls return, in their order, each made by one of `threads` threads: while one result is used, those
    behind it are made, as many as there are threads.

    Raises:
        Exception: what a call raised, when its turn has come; no further ones are begun.
    """
    reading: deque[Future[torch.Tensor]] = deque()
    left = iter(reads)
    with ThreadPoolExecutor(threads, "tpserve-reading") as pool:
        try:
            for _ in reads:
                reading.extend(pool.submit(read) for read in itertools.islice(left, threads - len(reading)))
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
