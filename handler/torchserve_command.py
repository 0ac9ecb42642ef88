"""`tpserve torchserve`: TorchServe's own command, whose end waits for running requests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from tpserve.engine.errors import ConfigError
from tpserve.engine.process import command_line, descendants, is_running, kill_all
from tpserve.handler.ending import DRAIN, DRAINED
from tpserve.handler.server_process import find_torchserve, java_environment

_OPTION = "--drain_timeout_s"
_DRAIN_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
_JAVA_CLASS = "org.pytorch.serve.ModelServer"


def run(arguments: Sequence[str]) -> int:
    """Does what `torchserve` does with these arguments; `--stop`, and a signal to `--start --foreground`, drain first.

    Args:
        arguments: of the command line; `--drain_timeout_s` is ours.

    Returns:
        the exit code.

    Raises:
        ConfigError: there is no torchserve, no Java, or the time to drain is none.
    """
    timeout_s, rest = _drain_timeout(arguments)
    if "--stop" in rest:
        pid = _running_pid()
        if pid is None:
            sys.stderr.write("TorchServe is not running\n")
        else:
            stop(pid, timeout_s)
        return 0
    process = subprocess.Popen([find_torchserve(), *rest], env=java_environment())

    def end(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # whoever is still impatient kills us
            signal.signal(number, signal.SIG_DFL)
        stop(process.pid, timeout_s)

    if "--foreground" in rest:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
    return process.wait()


def stop(pid: int, drain_timeout_s: float) -> list[int]:
    """Lets what runs finish, refuses what is new, and ends TorchServe.

    Args:
        pid: TorchServe's launcher or its Java.
        drain_timeout_s: so long may running requests go on; what is left is cut off.

    Returns:
        pids that had to be killed.
    """
    draining = [one for one in descendants(pid) if _takes_drain(one)]
    for one in draining:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, DRAIN)
    _wait(lambda: all(_name(one) in ("", DRAINED) for one in draining), drain_timeout_s)
    pids = [pid, *descendants(pid)]
    # The launcher waits for Java; at SIGTERM Java ends the backends, and the ranks die with those.
    for java in (one for one in pids if _JAVA_CLASS in command_line(one)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(java, signal.SIGTERM)
    _wait(lambda: not any(map(is_running, pids)), _STOP_TIMEOUT_S)
    left = [one for one in pids if is_running(one)]
    kill_all(left)
    return left


def _wait(until: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not until() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _drain_timeout(arguments: Sequence[str]) -> tuple[float, list[str]]:
    rest, given = [], str(_DRAIN_TIMEOUT_S)
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name.replace("-", "_").lstrip("_") == _OPTION.lstrip("-"):
            given = value if equals else next(left, "")
        else:
            rest.append(argument)
    try:
        timeout_s = float(given)
        if not 0 <= timeout_s < 1e6:
            raise ValueError
    except ValueError:
        raise ConfigError(f"drain_timeout_s must be a number of at least 0, got {given!r}") from None
    return timeout_s, rest


def _running_pid() -> int | None:
    """TorchServe's own record, at its own place."""
    try:
        pid = int(Path(tempfile.gettempdir(), ".model_server.pid").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pid if _JAVA_CLASS in command_line(pid) else None


def _takes_drain(pid: int) -> bool:
    """One of our backends; another model's would be ended by the signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    worker = any(part.endswith("model_service_worker.py") for part in command_line(pid))
    return worker and bool(caught >> (DRAIN - 1) & 1)


def _name(pid: int) -> str:
    """Of the process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
