"""One life of a rank group: launched by torchrun, spoken to over a socket, and ended completely."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tpserve.engine.channel import KEYS_FILE
from tpserve.engine.config import EngineConfig
from tpserve.engine.message_stream import ClientEnd
from tpserve.engine.node_place import Place, interface_of
from tpserve.engine.process import (
    children,
    command_line,
    descendants,
    environment_without_torchrun,
    is_running,
    is_stopped,
    kill_all,
    members_of_sessions,
    open_pidfd,
)
from tpserve.engine.protocol import Event, Reply, Stop

GO_FILE = "go"  # a FIFO in the group's folder: every rank waits for a byte of it before it takes a device or memory

logger = logging.getLogger(__name__)


class RankGroup:
    """A running group; every life gets its own directory and sockets, so nothing of an earlier one can arrive.

    Its ranks import what they need and wait until `go`. Must be made in a thread that outlives it: the kernel kills
    the group when that thread ends.

    Args:
        config: what the ranks are told.
        place: of a group over several machines: which part of it this is, the others' being launched by others.

    Attributes:
        has_gone: `go` was called.
    """

    # The module that a rank runs; benchmarks of everything else name one that computes nothing.
    worker = os.environ.get("TPSERVE_WORKER", "tpserve.engine.worker")

    def __init__(self, config: EngineConfig, place: Place | None = None) -> None:
        self.config = config
        self._size = config.tensor_parallel_size // config.num_nodes  # ranks here
        self.has_gone = False
        self._seen: set[int] = set()
        self._pid_of: dict[int, int] = {}  # torchrun's and the ranks', by their pidfds
        self._ended: int | None = None  # who ended first
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        with contextlib.ExitStack() as undo:
            self.folder = Path(tempfile.mkdtemp(prefix="tpserve-"))  # mode 0700
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "config.json").write_bytes(msgspec.json.encode(config))
            if place is not None:
                (self.folder / KEYS_FILE).write_bytes(msgspec.json.encode(place.keys))
            os.mkfifo(self.folder / GO_FILE, 0o600)
            # Read and write: opening does not wait, and the bytes stay until they are read.
            self._go = os.open(self.folder / GO_FILE, os.O_RDWR)
            undo.callback(os.close, self._go)
            self._rank_0 = ClientEnd(self.folder)
            undo.callback(self._rank_0.close)
            command, env = _command(config, self.folder, place), _environment(config, place)
            store = () if place is None or place.store is None else (place.store.fileno(),)
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=store
            )
            undo.callback(self._close_pidfds)
            self._watch(self._process.pid)
            self._cleanup = undo.pop_all()

    @property
    def pids(self) -> list[int]:
        """torchrun and everything below it, also what has lost its parent since it was last asked, and still runs."""
        self._seen = {pid for pid in self._seen if is_running(pid)}.union(descendants(self._process.pid))
        return [self._process.pid, *sorted(self._seen)]

    @property
    def rank_pids(self) -> list[int]:
        """The ranks' that have been found so far, in the order of their start."""
        return [pid for pid in self._pid_of.values() if pid != self._process.pid]

    @property
    def exit_status(self) -> int | None:
        """torchrun's, once it has ended."""
        return self._process.poll()

    @property
    def death(self) -> str | None:
        """What has ended, as words for a log; None while everything lives. Looked at by `receive`."""
        status = self.exit_status
        if self._ended is not None and self._ended != self._process.pid:
            return f"the rank group ended: a rank (pid {self._ended}) died"
        return None if status is None else f"the rank group ended with status {status}"

    @property
    def is_stopped(self) -> bool:
        """Whether one of its processes is stopped: a waiting group says nothing, so its silence does not show it."""
        return any(map(is_stopped, self._pid_of.values()))

    def go(self) -> None:
        """Lets the ranks take their devices, load, and serve; once."""
        self.has_gone = True
        os.write(self._go, b"g" * self._size)

    def send(self, *events: Event) -> None:
        """Sends events to rank 0, which takes all of them in before its next step; callers hold a lock, for an encoder
        belongs to one thread at a time."""
        if events:
            self._rank_0.send([self._encoder.encode(event) for event in events])

    def receive(self, timeout_s: float) -> list[Reply]:
        """What rank 0 said; waits at most so long for the first word, or for the end of a process of the group."""
        self._watch_ranks()
        deadline_s = time.monotonic() + timeout_s
        while (wait_s := deadline_s - time.monotonic()) > 0 and self._ended is None:
            heard, ended = self._rank_0.wait(wait_s)
            if ended:
                self._ended = self._pid_of[ended[0]]
            if heard:
                break
        return [self._decoder.decode(message) for message in self._rank_0.receive()]  # a dead group's last words, too

    def stop(self, timeout_s: float = 5.0) -> None:
        """Asks the group to end, then makes sure."""
        self.send(Stop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kills every process of the group, stopped ones too, and removes its directory."""
        self._watch_ranks()
        # What a rank had started may have lost its parent; torchrun gives every rank a session. Pids that were merely
        # seen at some time may be somebody else's by now.
        sessions = {self._process.pid, *self.rank_pids}
        pids = {self._process.pid, *descendants(self._process.pid), *members_of_sessions(sessions)}
        left = kill_all(sorted(pids))
        left += kill_all(members_of_sessions(sessions))
        if left:
            logger.error("processes %s survived SIGKILL", left)
        else:
            self._process.wait()
        self._cleanup.close()

    def _watch_ranks(self) -> None:
        if len(self._pid_of) > self._size or self._ended is not None:
            return
        for pid in children(self._process.pid):
            # At first a child has torchrun's arguments; later its own, of which the folder is the last one.
            arguments = command_line(pid)
            if pid not in self._pid_of.values() and arguments[-1:] == [str(self.folder)] and "-u" in arguments[:2]:
                self._watch(pid)

    def _watch(self, pid: int) -> None:
        self._seen.add(pid)
        self._seen.discard(self._process.pid)
        fd = open_pidfd(pid)
        if fd is not None:
            self._pid_of[fd] = pid
            self._rank_0.poll.register(fd, select.POLLIN)

    def _close_pidfds(self) -> None:
        for fd in self._pid_of:
            self._rank_0.poll.unregister(fd)
            os.close(fd)


def wait_for_go(folder: Path, meanwhile: Callable[[], None]) -> bool:
    """Waits, in a rank, until its group is to go on; False: whoever launched it has gone.

    Args:
        folder: the group's.
        meanwhile: called first, if there is time.
    """
    fd = os.open(folder / GO_FILE, os.O_RDONLY)
    try:
        if not select.select([fd], [], [], 0)[0]:
            meanwhile()
        return os.read(fd, 1) != b""
    finally:
        os.close(fd)


def _command(config: EngineConfig, folder: Path, place: Place | None) -> list[str]:
    # The static rendezvous exchanges nothing pickled, the c10d one does; a supervisor knows all that is needed.
    torchrun = (
        f"--nnodes {config.num_nodes} --nproc-per-node {config.tensor_parallel_size // config.num_nodes} "
        "--rdzv-backend static --max-restarts 0 --monitor-interval 0.1"
    ).split()
    store = "loopback"
    if place is not None:
        store = "elsewhere" if place.store is None else str(place.store.fileno())
        torchrun += ["--node-rank", str(place.rank), "--local-addr", place.own_address]
        torchrun += ["--master-addr", place.address, "--master-port", str(place.port)]
    launcher = [sys.executable, "-m", "tpserve.engine.launch", str(os.getpid()), store]
    return [*launcher, *torchrun, "-m", "tpserve.engine.rank", RankGroup.worker, str(folder)]


def _environment(config: EngineConfig, place: Place | None = None) -> dict[str, str]:
    env = environment_without_torchrun()
    # Where all ranks are on this machine, gloo would otherwise look up the host's name and bind to that address, and
    # NCCL listen on the first interface that others can reach, for as long as the group lives.
    interface = "lo" if place is None else interface_of(place.own_address)
    if interface is not None:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
        env.setdefault("NCCL_SOCKET_IFNAME", interface)
    size = config.tensor_parallel_size // config.num_nodes
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    if size == 1:
        # About a millisecond: longer than from one loop of a step to the next, shorter than anybody notices.
        env.setdefault("GOMP_SPINCOUNT", "100000")
    else:
        # Threads that spin at a barrier while another process has their core make a step forty times slower.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env
