"""What a process needs so that nothing outlives its owner. Linux; elsewhere the calls do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

LAUNCHER_PID = "TPSERVE_LAUNCHER_PID"  # set by `launch`: the pid that a rank's parent must have
LOG_LEVEL = "TPSERVE_LOG_LEVEL"  # of ranks: INFO, WARNING, …

# What torchrun tells its children; a group started from inside another one must not inherit it.
_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Asks the kernel to SIGKILL this process when the thread that started it ends.

    Args:
        parent_pid: the parent's pid as it knew it; when it is gone already, this process exits at once. None: the
            present parent.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 or (parent_pid is not None and os.getppid() != parent_pid):
        os._exit(1)


def kill_parent_with_grandparent() -> threading.Thread | None:
    """SIGKILLs this process's parent as soon as the parent's parent ends: for a parent that would live on for nobody.

    Returns:
        the thread that waits for it; None where /proc or pidfds are missing.
    """
    parent = os.getppid()
    try:
        watched = os.pidfd_open(_parent_of(parent))
    except (OSError, AttributeError):  # not Linux, or no right to
        return None

    def wait() -> None:
        poll = select.poll()
        poll.register(watched, select.POLLIN)  # readable at its end: pidfd_open(2)
        poll.poll()
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)

    thread = threading.Thread(target=wait, name="grandparent", daemon=True)
    thread.start()
    return thread


def settle_heap() -> None:
    """Takes all objects that there are now out of the garbage collector's rounds, and lets it begin.

    A process that has imported torch holds some 250,000, most of them for good, and a full round over them stops all
    of its threads for 0.15 s and more; in a group, one rank's stop is everybody's.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def environment_without_torchrun() -> dict[str, str]:
    """This process's environment less what a surrounding torchrun put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _TORCHRUN_VARIABLES and not name.startswith(("TORCHELASTIC_", "PET_"))
    }


def descendants(pid: int) -> list[int]:
    """Pids of the processes below `pid`, nearest first; empty where /proc does not tell."""
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for parent in level for child in children(parent)]
        found += level
    return found


def open_pidfd(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends; None where there are no pidfds, or no process."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def children(pid: int) -> list[int]:
    """Pids of the processes that `pid` started and that live; empty where /proc does not tell."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def command_line(pid: int) -> list[str]:
    """The arguments that a process was started with, or goes by (`go_by`); empty when it has ended."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0")
    except OSError:
        return []
    return text.split("\0") if text else []


def go_by(arguments: list[str]) -> None:
    """Writes other arguments over those that this process was started with, for whoever looks at its command line (such
    as `ps`). Linux.

    Raises:
        ValueError: they are longer than the old ones.
    """
    start, end = map(int, _after_name(os.getpid())[45:47])  # arg_start and arg_end (proc(5))
    line = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    if len(line) > end - start:
        raise ValueError("there is no room for so long a command line")
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def members_of_sessions(session_ids: set[int]) -> list[int]:
    """Pids of all processes of these sessions, whoever their parents are by now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int(_after_name(int(entry.name))[3]) in session_ids:
                found.append(int(entry.name))
    return found


def kill_all(pids: list[int], timeout_s: float = 10.0) -> list[int]:
    """SIGKILLs processes and waits for their end; a zombie that its parent has not reaped counts as ended.

    Returns:
        those that are still there after `timeout_s`.
    """
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > deadline_s:
            return alive
        time.sleep(0.01)
    return []


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return _after_name(pid)[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return not sys.platform.startswith("linux")


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        return _after_name(pid)[0] in "Tt"
    except (OSError, IndexError):
        return False


def _parent_of(pid: int) -> int:
    return int(_after_name(pid)[1])


def _after_name(pid: int) -> list[str]:
    # State and parent follow the command name, which stands in parentheses and may hold anything (proc(5)).
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
