"""Servers whose ranks are on two machines, and what is asked of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.machines.namespaces import ADDRESSES, environment, inside, two_machines
from tpserve.engine.process import command_line, descendants, is_running

PORT, KEY = 8080, "0f" * 16  # a namespace has all ports for itself
OPTIONS: dict[str, Any] = {"max_new_tokens": 120, "ignore_eos": True, "temperature": 0.9, "seed": 7}
PROMPT = [3, 5, 7]


class Machines:
    """The head on one, an agent on the other.

    Args:
        folder: for the checkpoint and logs.
        machines: what to put before commands.
        options: of the server, beside those that all have.
    """

    def __init__(self, folder: Path, machines: list[list[str]], *options: str) -> None:
        self.machines, self.folder, self.extra = machines, folder, options
        self.log = (folder / "log").open("ab")
        self.options = ["--checkpoint", str(folder / "out"), "--port", str(PORT), "--device", "cpu", *options]
        self.options += ["--tp", "2", "--num_nodes", "2", "--node_address", ADDRESSES[0], "--max_seq_len", "256"]
        self.head, self.agent = self.start_head(), self.start_agent()

    def start_head(self) -> subprocess.Popen[bytes]:
        self.head = self._start(self.machines[0], "serve", *self.options)
        return self.head

    def start_agent(self, port: int = 29400) -> subprocess.Popen[bytes]:
        self.agent = self._start(self.machines[1], "node", "--head", f"{ADDRESSES[0]}:{port}", "--name", "second")
        return self.agent

    def _start(self, machine: list[str], *arguments: str) -> subprocess.Popen[bytes]:
        env = environment() | {"TPSERVE_NODE_KEY": KEY}
        del env["GLOO_SOCKET_IFNAME"]  # found by the address
        command = [*machine, sys.executable, "-m", "tpserve.cli.main", *arguments]
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
        with contextlib.closing(connection), inside(self.machines[0]):
            connection.request(method, path, None if body is None else json.dumps(body))
            with connection.getresponse() as response:
                return response.status, response.read()

    def ids(self, **changes: Any) -> list[int]:
        status, body = self.ask("POST", "/predictions/out", {"prompt_token_ids": PROMPT, **OPTIONS, **changes})
        assert status == 200, body
        return [i for line in body.splitlines() for i in json.loads(line)["ids"]]

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.head.poll() is None, self.said()
            with contextlib.suppress(OSError):
                return self.ask("GET", "/health/ready")[0] == 200
            return False

        until(ready)

    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def ranks(self, of: subprocess.Popen[bytes]) -> list[int]:
        lines = {pid: command_line(pid) for pid in descendants(of.pid)}
        return [pid for pid, line in lines.items() if "-u" in line[:2] and "tpserve.engine.rank" in line]

    def close(self) -> None:
        pids = [p for one in (self.head, self.agent) for p in (one.pid, *descendants(one.pid))]
        for one in (self.head, self.agent):
            one.kill()
            one.wait()
        self.log.close()
        until(lambda: not [pid for pid in pids if is_running(pid)])


def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@contextlib.contextmanager
def serving(folder: Path, *options: str, kind: type[Machines] = Machines) -> Iterator[Machines]:
    with two_machines() as both:
        machines = kind(folder, both, *options)
        try:
            machines.wait_until_ready()
            yield machines
        except BaseException:
            sys.stderr.write(machines.said())
            raise
        finally:
            machines.close()


@contextlib.contextmanager
def in_flight(machines: Machines, expected: list[int]) -> Iterator[None]:
    """An answer that is being made now must be whole in the end."""
    answers: list[list[int]] = []
    thread = threading.Thread(target=lambda: answers.append(machines.ids()))
    thread.start()
    time.sleep(0.3)
    yield
    thread.join(120)
    assert answers == [expected], machines.said()
