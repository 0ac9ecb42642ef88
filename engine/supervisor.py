"""One life of a rank group: launched by torchrun, spoken to over ipc sockets, and ended completely."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import zmq

from tpserve.engine.channel import new_socket
from tpserve.engine.config import EngineConfig
from tpserve.engine.process import descendants, environment_without_torchrun, kill_all
from tpserve.engine.protocol import Event, Reply, Stop


class RankGroup:
    """A running group; every life gets its own directory and sockets, so nothing of an earlier one can arrive.

    Must be made in a thread that outlives it: the kernel kills the group when that thread ends.

    Args:
        config: what the ranks are told.
    """

    # The module that a rank runs; benchmarks of everything else name one that computes nothing.
    worker = os.environ.get("TPSERVE_WORKER", "tpserve.engine.worker")

    def __init__(self, config: EngineConfig) -> None:
        self._ranks: set[int] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)
        with contextlib.ExitStack() as undo:
            self.folder = Path(tempfile.mkdtemp(prefix="tpserve-"))  # mode 0700
            undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
            (self.folder / "config.json").write_bytes(msgspec.json.encode(config))
            self._replies = new_socket(zmq.PULL, f"ipc://{self.folder}/replies", bind=True)
            undo.callback(self._replies.close)
            self._events = new_socket(zmq.PUSH, f"ipc://{self.folder}/events", bind=False)
            undo.callback(self._events.close)
            command, env = _command(config, self.folder), _environment(config)
            self._process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
            self._cleanup = undo.pop_all()

    @property
    def pids(self) -> list[int]:
        """torchrun and its ranks, those too whose torchrun has ended."""
        self._ranks.update(descendants(self._process.pid))
        return [self._process.pid, *sorted(self._ranks)]

    @property
    def exit_status(self) -> int | None:
        """torchrun's, once it has ended."""
        return self._process.poll()

    def send(self, event: Event) -> None:
        """Sends an event to rank 0; callers hold a lock, for a socket belongs to one thread at a time."""
        self._events.send(self._encoder.encode(event))

    def receive(self, timeout_s: float) -> list[Reply]:
        """What rank 0 said; waits at most so long for the first."""
        replies: list[Reply] = []
        wait_ms = int(timeout_s * 1000)
        while self._replies.poll(wait_ms):
            replies.append(self._decoder.decode(self._replies.recv()))
            wait_ms = 0
        return replies

    def stop(self, timeout_s: float = 5.0) -> None:
        """Asks the group to end, then makes sure."""
        self.send(Stop())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kills every process of the group and removes its directory."""
        left = kill_all(self.pids)
        self._process.wait()
        self._cleanup.close()
        assert not left, f"processes {left} survived SIGKILL"


def _command(config: EngineConfig, folder: Path) -> list[str]:
    # The static rendezvous exchanges nothing pickled, the c10d one does; on one node it knows all that is needed.
    torchrun = (
        f"--nnodes 1 --nproc-per-node {config.tensor_parallel_size} --rdzv-backend static "
        f"--master-addr 127.0.0.1 --master-port {_free_port()} --max-restarts 0 --monitor-interval 0.1"
    ).split()
    launcher = [sys.executable, "-m", "tpserve.engine.launch", str(os.getpid())]
    return [*launcher, *torchrun, "-m", RankGroup.worker, str(folder)]


def _environment(config: EngineConfig) -> dict[str, str]:
    env = environment_without_torchrun()
    # All ranks are on this machine: gloo would otherwise look up the host's name and bind to that address.
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.tensor_parallel_size)))
    if config.tensor_parallel_size == 1:
        # About a millisecond: longer than from one loop of a step to the next, shorter than anybody notices.
        env.setdefault("GOMP_SPINCOUNT", "100000")
    else:
        # Threads that spin at a barrier while another process has their core make a step forty times slower.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
