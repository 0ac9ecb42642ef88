"""torchrun's ranks as forks of it: what takes a process seconds to import is imported once, and lies in memory once.

A rank that is forked goes by the command line that it would have been started with, and by its number. The threads of
torchrun, which the rank does not get, work for its store alone. torchrun asks whether there are GPUs, to bind ranks to
the processors beside them, which it is not told to do. It hears that there are none: whoever has asked CUDA cannot
fork processes that use it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing import api

from tpserve.engine.preload import NVIDIA
from tpserve.engine.process import go_by

NAME = "tpserve-rank"  # and its number: what `top` and /proc/PID/comm say
_POLL_S = 0.02
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ")  # proc_pid_smaps(5)
_sees_gpus = torch.cuda.is_available


def may_fork_ranks() -> bool:
    """Whether ranks can be forks here: on Linux, unless importing has asked CUDA for GPUs. A fork is asked."""
    if not sys.platform.startswith("linux"):
        return False
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return True
    if (pid := os.fork()) == 0:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitpid(pid, 0)[1] == 0


def fork_ranks() -> None:
    """The `torchrun` that this process is about to become forks its ranks, which must be modules of Python."""
    api.get_subprocess_handler = _Handler  # type: ignore[assignment, attr-defined]  # the one place that starts them
    torch.cuda.is_available = lambda: False


def own_pages() -> None:
    """Copies the memory that this fork shares with its parent, lest its first write to each page wait for that: 0.2 s
    and 220 MB after importing torch. Linux 5.14; before, nothing.
    """
    madvise = ctypes.CDLL(None).madvise
    start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            start, end = (int(address, 16) for address in mapping.groups()[:2])
            writable = mapping[3] == "rw-p"
        elif line.startswith("Rss:") and writable and 2 * 1024 * int(line.split()[1]) >= end - start:
            # Of others most is reserved, and never was written to.
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)


class _Forked:
    """A child as torchrun asks for it: of `subprocess.Popen`, what it uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while it runs; -N: of signal N."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Likewise; waits for so many seconds.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        deadline_s = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() >= deadline_s:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_S)
        return status


class _Handler:
    """Starts a rank; in place of torchrun's `SubprocessHandler`.

    Args:
        entrypoint, args: the command: an interpreter, -u, -m, the module and its arguments.
        env: what is added to this process's environment.
        local_rank_id: the rank, of those of this machine.
    """

    def __init__(
        self, entrypoint: str, args: tuple[str, ...], env: dict[str, str], local_rank_id: int, **_: Any
    ) -> None:
        self.local_rank_id = local_rank_id
        pid = os.fork()
        if pid == 0:
            _become([entrypoint, *args], env)
        self.proc = _Forked(pid)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        """Signals the rank and what it has started."""
        os.killpg(self.proc.pid, death_sig or signal.SIGTERM)


def _become(command: list[str], env: dict[str, str]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the store's
        os.environ.update(env)
        torch.cuda.is_available = _sees_gpus
        if NVIDIA.exists():  # else processors compute, and sharing is worth more
            own_pages()
        go_by(command)
        torch.multiprocessing._set_thread_name(f"{NAME}{env['RANK']}")
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        gc.disable()  # until `settle_heap`
        _, _, _, module, *sys.argv[1:] = command
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, this must not go on as a second torchrun
        traceback.print_exc()
    finally:
        os._exit(status)
