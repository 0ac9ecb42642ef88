"""Nothing outlives its owner."""

from __future__ import annotations

import json
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


GOES_BY = """
import os
from tpserve.engine.process import command_line, go_by
go_by(["rank", "-u", "two words"])
assert command_line(os.getpid()) == ["rank", "-u", "two words"], command_line(os.getpid())
try:
    go_by(["x" * 100_000])
except ValueError as e:
    print(e)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_a_process_goes_by_another_command_line_if_there_is_room() -> None:
    ran = subprocess.run([sys.executable, "-c", GOES_BY], check=True, capture_output=True, text=True)
    assert ran.stdout == "there is no room for so long a command line\n"


FORKED = """
import json, os, signal, sys
from tpserve.engine.forked_rank import _Handler
signal.signal(signal.SIGTERM, lambda *_: sys.exit("torchrun's own end"))
inherited = os.open("/dev/null", os.O_RDONLY)
for does in json.loads(sys.argv[1]):
    code = f"import os\\ntry: os.fstat({inherited})\\nexcept OSError: {does}"
    command = ("-u", "-m", "timeit", "-n1", "-r1", code)
    rank = _Handler(sys.executable, command, {"RANK": "3", "ONLY_THE_RANKS": "5"}, 0)
    assert rank.proc.wait(30) == rank.proc.poll()
    print(rank.proc.poll())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_a_forked_rank_is_what_a_new_process_would_be() -> None:
    """Its environment, signals, session, names and files; `timeit` stands for a rank's module."""
    expected = {
        "os._exit(int(os.environ['ONLY_THE_RANKS']))": 5,
        "os.kill(os.getpid(), 15)": -15,
        "os._exit(os.getsid(0) != os.getpid())": 0,
        "os._exit(open('/proc/self/comm').read().strip() != 'tpserve-rank3')": 0,
        "os._exit(open('/proc/self/cmdline').read().split(chr(0))[1:4] != ['-u', '-m', 'timeit'])": 0,
        "no_such_name": 1,
    }
    command = [sys.executable, "-c", FORKED, json.dumps(list(expected))]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == [str(status) for status in expected.values()], ran.stderr


OWNS = """
import os, sys
from tpserve.engine.forked_rank import own_pages
data = bytearray(b"x") * (64 << 20)
def faults():
    return int(open("/proc/self/stat").read().rpartition(")")[2].split()[7])
for owns in (False, True):
    if (pid := os.fork()) == 0:
        if owns:
            own_pages()
        before = faults()
        data[::4096] = b"y" * (len(data) // 4096)
        print(faults() - before, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for it")
def test_a_fork_that_owns_its_pages_does_not_wait_for_them() -> None:
    ran = subprocess.run([sys.executable, "-c", OWNS], check=True, capture_output=True, text=True)
    shared, owned = (int(line) for line in ran.stdout.split())
    assert owned < 50 < shared, ran.stdout
