"""Jobs for the device."""

from __future__ import annotations

import gc
import weakref

from tpserve.engine.device_queue import Job


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
