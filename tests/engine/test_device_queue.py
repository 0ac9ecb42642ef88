"""Jobs for the device."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

from tpserve.engine.device_queue import Job, StreamClock


class _Step:
    """Holds its job, whose function holds it."""

    def __init__(self) -> None:
        self.job = Job(lambda: id(self))


def test_a_job_that_is_done_holds_nobody() -> None:
    """Where garbage is not collected, as at a start, a step would stay with all that it computed with."""
    step = _Step()
    step.job.run()
    assert step.job.result() == id(step)
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


class _Event:
    """As CUDA's: what lies between two is told in float32 milliseconds."""

    now_ns = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.ns = _Event.now_ns

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: _Event) -> float:
        return float(np.float32((later.ns - self.ns) / 1e6))


def test_a_devices_clock_is_as_exact_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    clock = StreamClock(torch.device("cuda", 0))
    marks = []
    for at_ns in (3_600_000_000_123, 3_600_004_600_000, 3_600_004_620_000, 3_600_009_220_000):
        _Event.now_ns = at_ns
        marks.append(clock.mark())
    read_ns = [clock.read_ns(mark) for mark in marks]
    assert [b - a for a, b in itertools.pairwise(read_ns)] == pytest.approx([4_599_877, 20_000, 4_600_000], abs=2)
