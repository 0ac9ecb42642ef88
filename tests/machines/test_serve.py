"""A server whose two ranks are on two machines says what one rank says, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.requests import Collected
from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.machines.namespaces import ADDRESSES, cable, environment, inside, missing, two_machines
from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.process import command_line, descendants, is_running

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

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
        self.machines, self.folder = machines, folder
        self.log = (folder / "log").open("ab")
        self.options = ["--checkpoint", str(folder / "out"), "--port", str(PORT), "--device", "cpu", *options]
        self.options += ["--tp", "2", "--num_nodes", "2", "--node_address", ADDRESSES[0], "--max_seq_len", "256"]
        self.head, self.agent = self.start_head(), self.start_agent()

    def start_head(self) -> subprocess.Popen[bytes]:
        self.head = self._start(self.machines[0], "serve", *self.options)
        return self.head

    def start_agent(self) -> subprocess.Popen[bytes]:
        self.agent = self._start(self.machines[1], "node", "--head", f"{ADDRESSES[0]}:29400", "--name", "second")
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
        return [pid for pid in descendants(of.pid) if "-u" in command_line(pid)[:2]]

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("machines")
    write_fairscale_checkpoint(made / "in", {**TINY_PARAMS, "vocab_size": 200}, mp=2, seed=5)
    convert(made / "in", made / "out", progress=False)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[int]:
    """What one rank says."""
    config = EngineConfig(checkpoint_dir=str(folder / "out"), device="cpu", max_seq_len=256, standby=False)
    client = EngineClient(config)
    try:
        client.start()
        return Collected(client, PROMPT, **OPTIONS).wait()
    finally:
        client.close()


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Machines]:
    with two_machines() as both:
        machines = Machines(folder, both, *options)
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


@pytest.mark.timeout(300)
def test_two_machines(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "False") as machines:
        assert len(alone) == OPTIONS["max_new_tokens"]
        assert machines.ids() == alone
        (rank,) = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            os.kill(rank, signal.SIGKILL)
        (rank,) = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            machines.agent.kill()
            machines.agent.wait()
            until(lambda: not is_running(rank), 20)  # a rank does not outlive its agent
            machines.start_agent()
        text = machines.said()
        assert "machine second: the rank group ended: a rank" in text
        assert "machine second is lost" in text
        assert machines.ask("GET", "/health/ready")[0] == 200
        machines.head.send_signal(signal.SIGTERM)
        assert machines.head.wait(30) == 0
        until(lambda: not descendants(machines.agent.pid), 20)
        machines.agent.send_signal(signal.SIGTERM)  # an agent without a head has nothing to wait for
        assert machines.agent.wait(20) == 0


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_with_a_standby_and_cut_cables(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "True", "--max_restarts", "10") as machines:
        for dying in (machines.agent, machines.head):
            until(lambda: [len(machines.ranks(one)) for one in (machines.head, machines.agent)] == [2, 2])
            time.sleep(5)  # it imports
            before = machines.ranks(machines.head) + machines.ranks(machines.agent)
            with in_flight(machines, alone):
                os.kill(min(machines.ranks(dying)), signal.SIGKILL)
            assert len({*before} & {*machines.ranks(machines.head), *machines.ranks(machines.agent)}) == 2
        ranks = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            cable(machines.machines[1], "down")
            until(lambda: not [rank for rank in ranks if is_running(rank)], 40)  # a lonely agent ends its ranks
            cable(machines.machines[1], "up")
        text = machines.said()
        assert "silent for 10 s" in text or "step_timeout_s" in text or "is lost" in text


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_head_that_dies_and_comes_back(folder: Path, alone: list[int]) -> None:
    with serving(folder, "--standby", "False") as machines:
        ranks = machines.ranks(machines.agent)
        machines.head.kill()
        machines.head.wait()
        until(lambda: not [rank for rank in ranks if is_running(rank)], 20)
        machines.start_head()
        machines.wait_until_ready()
        assert machines.ids() == alone
