"""torchrun as the way into serving: the same command on every machine, and nothing is left when it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machines.namespaces import ADDRESSES, environment, missing, two_machines
from tests.machines.serving import KEY, OPTIONS, PORT, PROMPT, Machines, in_flight, serving, until
from tpserve.engine.process import descendants, is_running
from tpserve.handler.torchrun import NODE_PORT

REASON = missing()
needs_machines = pytest.mark.skipif(REASON is not None, reason=REASON or "")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SERVE = ["-m", "tpserve.cli.main", "serve", "--device", "cpu", "--max_seq_len", "256", "--standby", "False"]


class TorchrunMachines(Machines):
    """Two torchruns; the machine `endpoint` has the rendezvous' store."""

    endpoint, max_restarts = 0, 0

    def start_head(self) -> subprocess.Popen[bytes]:
        self.head = self._torchrun(0)
        return self.head

    def start_agent(self, port: int = NODE_PORT) -> subprocess.Popen[bytes]:
        self.agent = self._torchrun(1)
        return self.agent

    def rendezvous(self, number: int) -> list[str]:
        """What torchrun is told of it on one of the machines."""
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[self.endpoint]}:29500", "--rdzv-id", "7"]
        # Neither is needed where machines have names: these two have one.
        return [*where, "--local-addr", ADDRESSES[number], "--rdzv-conf", f"is_host={number == self.endpoint}"]

    def _torchrun(self, number: int) -> subprocess.Popen[bytes]:
        command = [*self.machines[number], *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--max-restarts", str(self.max_restarts), *self.rendezvous(number)]
        command += [*SERVE, "--checkpoint", str(self.folder / "out"), "--port", str(PORT), *self.extra]
        env = environment() | {"TPSERVE_NODE_KEY": KEY}
        del env["GLOO_SOCKET_IFNAME"]
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)


class EndpointElsewhere(TorchrunMachines):
    endpoint = 1


class Static(TorchrunMachines):
    def rendezvous(self, number: int) -> list[str]:
        where = ["--rdzv-backend", "static", "--node-rank", str(number)]
        return [*where, "--master-addr", ADDRESSES[0], "--master-port", "29500"]


class WithRestarts(TorchrunMachines):
    max_restarts = 2


def everything(machines: Machines) -> list[int]:
    both = (machines.head, machines.agent)
    return [pid for one in both for pid in (one.pid, *descendants(one.pid))]


def all_gone(pids: list[int], timeout_s: float = 10) -> None:
    until(lambda: not [pid for pid in pids if is_running(pid)], timeout_s)


@pytest.mark.faults  # `make test` has one machine, and two of `tpserve node`
@needs_machines
@pytest.mark.timeout(300)
def test_two_machines(folder: Path, alone: list[int]) -> None:
    with serving(folder, kind=TorchrunMachines) as machines:
        assert machines.ids() == alone
        torchruns = everything(machines)
        (rank,) = machines.ranks(machines.agent)
        with in_flight(machines, alone):
            os.kill(rank, signal.SIGKILL)
        pids = everything(machines)
        assert {machines.head.pid, machines.agent.pid} < {*pids} & {*torchruns}  # torchrun has not noticed
        with in_flight(machines, alone):  # what is being answered is answered, though all are told to end
            for one in (machines.agent, machines.head):
                one.send_signal(signal.SIGTERM)
        assert [one.wait(30) for one in (machines.head, machines.agent)] == [1, 1]  # as after every signal
        all_gone(pids)
        text = machines.said()
        assert "the rank group ended: a rank" in text
        assert text.rindex('"POST"') > text.index("draining for")  # it was still being answered


@needs_machines
@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [TorchrunMachines, EndpointElsewhere, Static])
@pytest.mark.parametrize("how", ["SIGKILL of the front", "SIGKILL of torchrun", "SIGTERM of torchrun"])
def test_a_head_that_ends_ends_all(folder: Path, kind: type[Machines], how: str) -> None:
    with serving(folder, kind=kind) as machines:
        pids = everything(machines)
        front = descendants(machines.head.pid)[0]
        whom = front if "front" in how else machines.head.pid
        os.kill(whom, signal.SIGTERM if "SIGTERM" in how else signal.SIGKILL)
        assert machines.agent.wait(20) == 1
        assert machines.head.wait(20) == (-signal.SIGKILL if how == "SIGKILL of torchrun" else 1)
        all_gone(pids)


@needs_machines
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(TorchrunMachines, marks=pytest.mark.faults),
        pytest.param(Static, marks=pytest.mark.faults),
        EndpointElsewhere,
    ],
)
def test_a_head_that_does_not_begin_ends_all(folder: Path, kind: type[Machines]) -> None:
    with two_machines() as both:
        machines = kind(folder, both, "--api_key_file", "/nowhere")  # which only the head reads
        try:
            assert [one.wait(30) for one in (machines.agent, machines.head)] == [1, 1]
            assert "error: api_key_file" in machines.said(), machines.said()
        finally:
            machines.close()


@needs_machines
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_torchruns_own_restarts_bring_a_front_back(folder: Path, alone: list[int]) -> None:
    with serving(folder, kind=WithRestarts) as machines:
        front, agent = descendants(machines.head.pid)[0], descendants(machines.agent.pid)[0]
        os.kill(front, signal.SIGKILL)
        until(lambda: not is_running(agent), 20)
        machines.wait_until_ready()
        assert machines.ids() == alone
        assert {front, agent} & {*everything(machines)} == set()


@needs_machines
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_machine_whose_torchrun_has_ended_comes_back_as_an_agent(folder: Path, alone: list[int]) -> None:
    with serving(folder, kind=TorchrunMachines) as machines:
        front = descendants(machines.head.pid)[0]
        with in_flight(machines, alone):
            machines.agent.kill()
            machines.agent.wait()
            Machines.start_agent(machines, NODE_PORT)
        assert descendants(machines.head.pid)[0] == front


class Single:
    """One torchrun with two places on this machine."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *SERVE]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--checkpoint", str(folder / "out"), "--port", "0"],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def port(self) -> int:
        def found() -> list[str]:
            assert self.process.poll() is None, self.log.read_text()
            return [line for line in self.log.read_text().splitlines() if line.startswith("serving ")]

        until(found)
        return int(found()[0].rpartition(":")[2])

    def ask(self, body: Any) -> list[dict[str, Any]]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port(), timeout=60)) as connection:
            connection.request("POST", "/predictions/out", json.dumps(body))
            with connection.getresponse() as response:
                assert response.status == 200
                return [json.loads(line) for line in response.read().splitlines()]


@pytest.fixture
def single(folder: Path, tmp_path: Path) -> Iterator[Single]:
    one = Single(folder, tmp_path / "log")
    yield one
    one.process.kill()
    one.process.wait()


def test_one_machine(single: Single, alone: list[int]) -> None:
    assert [i for line in single.ask({"prompt_token_ids": PROMPT, **OPTIONS}) for i in line["ids"]] == alone
    pids = [single.process.pid, *descendants(single.process.pid)]
    assert len(pids) == 6  # torchrun, the front, who waits, the front's torchrun, its two ranks
    single.process.send_signal(signal.SIGTERM)
    assert single.process.wait(20) == 1, single.log.read_text()
    all_gone(pids)
    assert "is killed" not in single.log.read_text()


def test_a_refusal_ends_torchrun(folder: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *SERVE, "--tp", "3", "--checkpoint", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "error: tp is 3, but torchrun has 2 processes on 1 machines" in done.stderr
