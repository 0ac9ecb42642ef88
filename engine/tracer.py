"""Where a step's time goes, recorded for a number of steps when somebody asks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType

from tpserve.engine.protocol import RankTrace, Span


class _Off:
    """What `span` returns while nobody asks: costs two calls."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None: ...


_OFF = _Off()


class Tracer:
    """Records spans of this rank's steps between `start` and the end of the last one asked for.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._trace_id = 0
        self._steps_left = 0
        self._spans: list[Span] = []
        self._complete: list[RankTrace] = []

    def start(self, trace_id: int, num_steps: int) -> None:
        """Begins a recording; one that runs is ended early."""
        if self._steps_left:
            self._complete.append(RankTrace(self._trace_id, self._rank, self._spans))
        self._trace_id, self._steps_left, self._spans = trace_id, num_steps, []

    @property
    def active(self) -> bool:
        """Whether this step is recorded."""
        return self._steps_left > 0

    def span(self, name: str, **about: int) -> contextlib.AbstractContextManager[None]:
        """Records what runs inside it."""
        return self._record(name, about) if self._steps_left else _OFF

    @contextlib.contextmanager
    def _record(self, name: str, about: dict[str, int]) -> Iterator[None]:
        start_ns = time.monotonic_ns()
        yield
        self._spans.append(Span(self._rank, "host", name, start_ns, time.monotonic_ns() - start_ns, about))

    def device(self, device_ns: list[int]) -> None:
        """Records a step's time on the device: its start and its end."""
        if self._steps_left and len(device_ns) == 2:
            start_ns, end_ns = device_ns
            self._spans.append(Span(self._rank, "device", "step", start_ns, end_ns - start_ns))

    def end_step(self) -> None:
        """Counts the step."""
        if self._steps_left:
            self._steps_left -= 1
            if not self._steps_left:
                self._complete.append(RankTrace(self._trace_id, self._rank, self._spans))
                self._spans = []

    def take(self) -> list[RankTrace]:
        """Recordings that are complete."""
        complete, self._complete = self._complete, []
        return complete
