"""Nothing outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tpserve.engine.process import is_running, is_stopped

CHILD = """
import sys, time
from tpserve.engine.process import die_with_parent, kill_parent_with_grandparent
die_with_parent()
if sys.argv[1] == "watched":
    assert kill_parent_with_grandparent()
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
GRANDPARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[3], *sys.argv[1:3]])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_a_stopped_process_is_told_from_one_that_sleeps() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            assert not is_stopped(child.pid)
            child.send_signal(signal.SIGSTOP)
            deadline_s = time.monotonic() + 10
            while not is_stopped(child.pid) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert is_stopped(child.pid)
            assert is_running(child.pid)
        finally:
            child.kill()
    assert not is_stopped(child.pid)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfds")
@pytest.mark.parametrize("how", ["watched", "unwatched"])
def test_a_parent_that_would_live_on_goes_with_the_grandparent(how: str) -> None:
    command = [sys.executable, "-c", GRANDPARENT, how, CHILD, PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as grandparent:
        assert grandparent.stdout is not None
        pids = [int(pid) for pid in grandparent.stdout.readline().split()]
        assert [is_running(pid) for pid in pids] == [True, True]
        grandparent.kill()
    try:
        deadline_s = time.monotonic() + (10 if how == "watched" else 0.5)
        while any(map(is_running, pids)) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        # Unwatched it does live on, which is what the other case would not show.
        assert [is_running(pid) for pid in pids] == [how == "unwatched"] * 2
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


LAUNCHER = """
import os, subprocess, sys
from tpserve.engine.process import LAUNCHER_PID
command = [sys.executable, "-u", "-m", "tpserve.engine.rank", "timeit", "-n1", "-r1"]
command.append("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
subprocess.run(command, env={**os.environ, LAUNCHER_PID: str(os.getpid())})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_a_rank_dies_with_its_launcher_whatever_it_is_doing() -> None:
    """A module that knows nothing of it stands for one that is still importing."""
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        assert is_running(rank)
        launcher.kill()
    deadline_s = time.monotonic() + 10
    while is_running(rank) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not is_running(rank)
