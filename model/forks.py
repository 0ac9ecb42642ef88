"""Work that forks of this process do: what threads of one interpreter would take turns at."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import warnings
from collections.abc import Callable
from typing import NoReturn

_RECORD = 2  # bytes of a number in the pipe
MAX_CALLS = 2048  # of one round: a page, for which every pipe has room

logger = logging.getLogger(__name__)


def do_in_forks(work: Callable[[int], object], calls: int, processes: int, patience_s: float = 30.0) -> None:
    """work(0) … work(calls - 1), in this order, by forks that draw the next number when they are done with one.

    What a call returns or raises, and what it changes in memory, is lost: whoever needs a result looks for it on disk,
    and finds some missing. A fork that dies takes its call with it; when none has been done with anything for
    `patience_s`, all are killed. Where this process has begun to use CUDA, a fork cannot use it.

    Args:
        work: must not wait for other threads of this process, of which a fork has none.
        calls: up to `MAX_CALLS`.
        processes: at most so many forks at a time.

    Raises:
        OSError: there can be no forks.
    """
    assert calls <= MAX_CALLS
    numbers, put = os.pipe()
    heard, say = os.pipe()
    pids: list[int] = []
    try:
        os.write(put, b"".join(i.to_bytes(_RECORD, "little") for i in range(calls)))
        os.close(put)
        parent = os.getpid()
        for _ in range(min(processes, calls)):
            with warnings.catch_warnings():  # that a process with threads should not: see `work`
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                os.close(heard)
                _draw(work, numbers, say, parent)
            pids.append(pid)
        os.close(say)
        say = -1
        while select.select([heard], [], [], patience_s)[0]:
            if not os.read(heard, 4096):  # everybody has closed the other end
                return
        logger.warning("forks were silent for %.0f s, and are killed", patience_s)
    finally:
        for fd in (numbers, heard, say):
            if fd >= 0:
                os.close(fd)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _draw(work: Callable[[int], object], numbers: int, say: int, parent: int) -> NoReturn:
    try:
        while os.getppid() == parent and (record := os.read(numbers, _RECORD)):
            with contextlib.suppress(Exception):
                work(int.from_bytes(record, "little"))
            os.write(say, b".")
    finally:
        os._exit(0)  # nothing of the parent's is flushed, closed or freed twice
