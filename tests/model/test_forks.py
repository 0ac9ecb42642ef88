"""Work by forks of this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tpserve.model.forks import MAX_CALLS, do_in_forks


def mark(folder: Path, i: int) -> None:
    (folder / str(i)).write_text(str(os.getpid()))


def marks(folder: Path) -> dict[int, int]:
    """By number, who did it."""
    return {int(path.name): int(path.read_text()) for path in folder.iterdir()}


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("calls", "processes"), [(0, 4), (1, 4), (50, 1), (50, 3), (MAX_CALLS, 2)])
def test_every_call_is_made_once_by_somebody_else(tmp_path: Path, calls: int, processes: int) -> None:
    before = fds()
    if calls > 1000:  # the pipe holds as many as it says
        do_in_forks(lambda i: mark(tmp_path, i) if i >= calls - 5 else None, calls, processes)
        assert sorted(marks(tmp_path)) == list(range(calls - 5, calls))
    else:
        do_in_forks(lambda i: mark(tmp_path, i), calls, processes)
        assert sorted(marks(tmp_path)) == list(range(calls))
    assert os.getpid() not in marks(tmp_path).values()
    assert len(set(marks(tmp_path).values())) <= processes
    assert fds() == before


def test_calls_are_made_at_a_time(tmp_path: Path) -> None:
    """Each waits until the other one has begun."""

    def work(i: int) -> None:
        (tmp_path / f"begun {i}").touch()
        deadline_s = time.monotonic() + 20
        while not (tmp_path / f"begun {1 - i}").exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        (tmp_path / str(i)).touch()

    do_in_forks(work, 2, 2)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}


def test_what_goes_wrong_in_a_call_stays_there(tmp_path: Path) -> None:
    def work(i: int) -> None:
        if i == 3:
            raise ValueError(i)
        if i == 5:
            os._exit(9)
        mark(tmp_path, i)

    do_in_forks(work, 12, 2)
    assert sorted(marks(tmp_path)) == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]


def test_forks_that_hang_are_killed(tmp_path: Path) -> None:
    def work(i: int) -> None:
        mark(tmp_path, i)
        time.sleep(60 if i == 2 else 0)

    started_s = time.monotonic()
    do_in_forks(work, 6, 2, patience_s=0.5)
    assert time.monotonic() - started_s < 20
    done = marks(tmp_path)
    assert sorted(done) == list(range(6)), "the other one went on"
    with pytest.raises(ProcessLookupError):
        os.kill(done[2], 0)


def test_a_fork_ends_after_its_parent(tmp_path: Path) -> None:
    """When it is done with what it does: nobody needs the rest."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from tpserve.model.forks import do_in_forks\n"
        "def work(i):\n"
        "    Path(sys.argv[1], str(i)).write_text(str(os.getpid()))\n"
        "    if i == 0: os.kill(os.getppid(), 9)\n"
        "    time.sleep(0.5)\n"
        "do_in_forks(work, 100, 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == -9
    (pid,) = set(marks(tmp_path).values())
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert sorted(marks(tmp_path)) == [0]
