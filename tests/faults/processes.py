"""What runs, by /proc: the processes that bear a test's mark, and the rank groups below a server. Linux only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

from tpserve.engine.forked_rank import NAME
from tpserve.engine.process import children, command_line, descendants, is_running
from tpserve.engine.supervisor import GO_FILE

MARK = "TPSERVE_TEST_MARK"  # in the environment of a server, which everything that it starts inherits


@dataclasses.dataclass(frozen=True)
class Group:
    """A rank group, whatever it does.

    Attributes:
        launcher: torchrun.
        ranks: in order; as many as there are by now.
        folder: its sockets.
    """

    launcher: int
    ranks: tuple[int, ...]
    folder: Path

    @property
    def pids(self) -> tuple[int, ...]:
        return (self.launcher, *self.ranks)

    @property
    def serves(self) -> bool:
        """Rank 0 has made the sockets of its followers (TP > 1), which is the last that it does before it is ready."""
        return (self.folder / "rank1").exists() and all(map(is_running, self.pids))

    @property
    def waits(self) -> bool:
        """It has been imported and is not told to go on: every rank holds the FIFO open and does nothing."""
        fifo = str(self.folder / GO_FILE)
        return bool(self.ranks) and all(fifo in _open_files(pid) and _sleeps(pid) for pid in self.ranks)


def groups(front: int, size: int) -> list[Group]:
    """The rank groups that a process has started and that have all their ranks, oldest first.

    Args:
        front: the process that holds the engine's client.
        size: ranks of a group.
    """
    found = []
    for launcher in children(front):
        if "tpserve.engine.launch" not in command_line(launcher):
            continue
        ranks: dict[int, int] = {}
        folder = command_line(launcher)[-1:]
        for pid in descendants(launcher):
            if "-u" in (arguments := command_line(pid))[:2] and arguments[-1:] == folder:
                name = _name(pid)  # of a fork, whose environment is torchrun's
                rank = name.removeprefix(NAME) if name.startswith(NAME) else environment(pid).get("RANK", "")
                if rank.isdigit():
                    ranks[int(rank)] = pid
        if len(ranks) == size:
            found.append(Group(launcher, tuple(ranks[rank] for rank in sorted(ranks)), Path(folder[0])))
    return sorted(found, key=lambda group: group.launcher)


def marked(mark: str) -> list[int]:
    """All processes that inherited a mark, zombies not among them, whoever their parents are by now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid != os.getpid() and environment(pid).get(MARK) == mark and is_running(pid):
            found.append(pid)
    return found


def environment(pid: int) -> dict[str, str]:
    """What a process was started with; empty when it has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def rss_mib(pid: int) -> float:
    """Resident memory; 0 when the process has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_fds(pid: int) -> int:
    """Open file descriptors; 0 when the process has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _open_files(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(fd))
    return found


def _sleeps(pid: int) -> bool:
    # Reading from a FIFO: `fifo_open` and importing look otherwise.
    try:
        return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False
