"""Both fronts with the demo model, one interface: where they are, which processes they are, and their end."""

from __future__ import annotations

import abc
import contextlib
import http.client
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.faults.processes import MARK, Group, groups, marked
from tests.helpers.data import DEMO_CHECKPOINT
from tests.serve.process import Served
from tests.torchserve.server import SHORT_LIVED
from tpserve.convert.convert import convert
from tpserve.engine.process import command_line, descendants, kill_all
from tpserve.handler.archive import archive, default_config
from tpserve.handler.server_process import TorchServeProcess

NAMES = ("serve", "torchserve")
# Any number of faults, one soon after the other: a group that has served for a second counts as one that works.
OPTIONS: dict[str, Any] = {
    "max_seq_len": 1024, "max_batch_size": 32, "max_num_waiting": 256, "max_new_tokens": 900,
    "max_restarts": 1000, "restart_window_s": 1.0, "step_timeout_s": 5.0, "start_timeout_s": 90.0,
}  # fmt: skip


class Front(abc.ABC):
    """A running server.

    Args:
        size: ranks.

    Attributes:
        size: ranks.
        port: on 127.0.0.1.
        base: of the protocols' paths, without a slash at its end.
        predictions: the path of our own protocol.
        log: what it prints.
    """

    name: str
    port: int
    base: str
    predictions: str
    log: Path

    def __init__(self, size: int) -> None:
        self.size = size
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="tps-"))  # short: sockets live below it

    @property
    @abc.abstractmethod
    def owner(self) -> int:
        """The process that holds the engine's client."""

    @property
    @abc.abstractmethod
    def root(self) -> int:
        """The process that was started."""

    @abc.abstractmethod
    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        """Returns when a token can be made."""

    @abc.abstractmethod
    def stop(self) -> list[int]:
        """Ends it; returns the processes that outlived it, which are killed."""

    @property
    def groups(self) -> list[Group]:
        """Complete rank groups, oldest first."""
        return groups(self.owner, self.size)

    @property
    def serving(self) -> Group | None:
        """The group that makes tokens now."""
        return next((group for group in reversed(self.groups) if group.serves), None)

    @property
    def standby(self) -> Group | None:
        """The group that waits, imported."""
        return next((group for group in self.groups if group.waits), None)

    @property
    def processes(self) -> list[int]:
        """All that were started for it, by whomever."""
        return marked(self.mark)

    @property
    def orphans(self) -> list[int]:
        """Those of them that have lost their parents."""
        return sorted({*self.processes} - {self.root, *descendants(self.root)})

    def ask(self, path: str, body: Any = None, timeout_s: float = 60.0) -> tuple[int, bytes]:
        """Status and body of a whole reply; with a body it is a POST."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)) as connection:
            encoded = None if body is None else json.dumps(body).encode()
            method = "GET" if body is None else "POST"
            connection.request(method, f"{self.base}/{path}", encoded, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                return response.status, response.read()

    def ready(self) -> bool:
        """What its readiness says; a server that does not answer is not ready."""
        try:
            return self.ask("health/ready", timeout_s=10.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def blocks_in_use(self) -> list[int]:
        """KV blocks in use on every rank."""
        status, body = self.ask("status")
        assert status == 200, body
        return [rank["num_blocks_in_use"] for rank in json.loads(body)["ranks"]]

    def _outlived(self, timeout_s: float = 5.0) -> list[int]:
        deadline_s = time.monotonic() + timeout_s
        while (left := self.processes) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        kill_all(left)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


class SecondFront(Front):
    """`tpserve serve`."""

    name = "serve"

    def __init__(self, checkpoint: Path, size: int = 2, port: int = 0, **options: Any) -> None:
        super().__init__(size)
        given = OPTIONS | {"access_log": False} | options
        arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        self.log = self.folder / "log"
        env = {MARK: self.mark, "TMPDIR": str(self.folder)}
        self.served = Served(checkpoint, self.log, "--tp", str(size), "--port", str(port), *arguments, env=env)
        self.base, self.predictions = "", f"predictions/{checkpoint.name}"

    @property
    def owner(self) -> int:
        return self.root

    @property
    def root(self) -> int:
        return self.served.process.pid

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        self.served.wait_until_ready(timeout_s)
        self.port = self.served.port

    def stop(self) -> list[int]:
        if self.served.process.poll() is None:
            self.served.process.terminate()
            with contextlib.suppress(Exception):
                self.served.process.wait(20)
        self.served.close()
        return self._outlived()


class TorchServe(Front):
    """TorchServe with a `.mar`."""

    name = "torchserve"

    def __init__(
        self, checkpoint: Path, size: int = 2, properties: dict[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(size)
        content = yaml.safe_load(default_config(dim=256).read_text())
        content["handler"] |= OPTIONS | options
        content["batchSize"] = 512
        config = self.folder / "config.yaml"
        config.write_text(yaml.safe_dump(content))
        made = archive(checkpoint, config=config, export_path=self.folder / "store", tensor_parallel_size=size)
        with _environment(MARK, self.mark):
            self.process = TorchServeProcess(
                self.folder / "store",
                [made.models],
                disable_system_metrics="true",
                vmargs=SHORT_LIVED,
                **(properties or {}),
            )
        self.log, self.port = self.process.log, self.process.port
        self.base, self.predictions = "/predictions/llama/1.0", ""

    @property
    def owner(self) -> int:
        below = descendants(self.root)
        return next((pid for pid in below if any("model_service_worker" in a for a in command_line(pid))), -1)

    @property
    def root(self) -> int:
        return self.process.pids[0]

    def wait_until_ready(self, timeout_s: float = 120.0) -> None:
        self.process.wait_until_ready(timeout_s)

    def stop(self) -> list[int]:
        left = self.process.stop()
        left += self._outlived()
        self.process.remove()
        return left


def start(name: str, checkpoint: Path, size: int = 2, **options: Any) -> Front:
    """A front that is starting."""
    return (SecondFront if name == "serve" else TorchServe)(checkpoint, size, **options)


@contextlib.contextmanager
def demo() -> Iterator[Path]:
    """The demo model, converted for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="tps-") as name:
        yield convert(DEMO_CHECKPOINT, Path(name) / "demo", progress=False)


def taken_port() -> socket.socket:
    """A listening socket of somebody else."""
    return socket.create_server(("127.0.0.1", 0))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
