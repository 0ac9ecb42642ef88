"""What `tpserve serve` becomes when torchrun started it, from what torchrun says in the environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tpserve.engine.errors import ConfigError
from tpserve.engine.node_protocol import KEY_VARIABLE
from tpserve.handler import torchrun
from tpserve.handler.torchrun import NODE_PORT, TorchrunPlace, serve


def environment(machine: int, local_rank: int, here: int = 2, machines: int = 2) -> dict[str, str]:
    """As torchrun makes it."""
    return {
        "TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": str(machine),
        "GROUP_WORLD_SIZE": str(machines), "RANK": str(machine * here + local_rank), "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(here), "WORLD_SIZE": str(here * machines), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4000",
    }  # fmt: skip


def place(*where: int, **sizes: int) -> TorchrunPlace:
    found = TorchrunPlace.read(environment(*where, **sizes))
    assert found is not None
    return found


class Roles:
    """What was called, and with what."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.called: list[tuple[str, Any]] = []
        self.environment: dict[str, str] = {}
        patch.setattr(torchrun.front, "serve", self._front)
        patch.setattr(torchrun, "run_agent", lambda agent: self.called.append(("agent", agent)))
        patch.setattr(torchrun, "_wait_for_the_end", self._wait)
        patch.setattr(torchrun, "die_with_parent", lambda: None)

    def _front(self, checkpoint: str, tp: int | None, announce: Any, **options: Any) -> None:
        self.called.append(("front", (tp, options)))
        self.environment = dict(os.environ)

    def _wait(self) -> None:
        self.called.append(("wait", None))
        sys.exit(0)


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    before = dict(os.environ)
    yield Roles(monkeypatch)
    os.environ.clear()
    os.environ.update(before)


def run(env: dict[str, str], checkpoint: Path, tp: int | None = None, **options: Any) -> int:
    os.environ.update(env)
    with pytest.raises(SystemExit) as ended:
        serve(str(checkpoint), tp, **options)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_without_torchrun_nothing_changes(roles: Roles, tmp_path: Path) -> None:
    assert TorchrunPlace.read({"RANK": "1", "WORLD_SIZE": "2"}) is None
    serve(str(tmp_path), 2, port=0)
    assert roles.called == [("front", (2, {"port": 0}))]


def test_the_head(roles: Roles, tmp_path: Path) -> None:
    assert run(environment(0, 0), tmp_path, port=0) == 143  # a success would leave torchrun waiting for the others
    expected = {"tensor_parallel_size": 4, "num_nodes": 2, "node_address": "127.0.0.1", "node_port": NODE_PORT}
    assert roles.called == [("front", (None, {"port": 0, **expected}))]
    for name in environment(0, 0):
        assert name not in roles.environment
    assert roles.environment[KEY_VARIABLE] == "k" * 32


def test_one_machine(roles: Roles, tmp_path: Path) -> None:
    assert run(environment(0, 0, machines=1), tmp_path, 2) == 143
    assert roles.called == [("front", (None, {"tensor_parallel_size": 2, "num_nodes": 1}))]


def test_an_agent(roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Agent:
        def __init__(self, *where: Any, **options: Any) -> None:
            made.update(options, where=where)

    monkeypatch.setattr(torchrun, "NodeAgent", Agent)
    assert run(environment(1, 0), tmp_path, 4, num_nodes=2, drain_timeout_s=3, port=0) == 143
    assert [role for role, _ in roles.called] == ["agent"]
    assert made["where"][0] == f"127.0.0.1:{NODE_PORT}"
    assert made["where"][2] == f"{socket.gethostname()}-1"
    assert made["checkpoint"] == str(tmp_path)
    assert made["drain_timeout_s"] == 3
    assert made["one_life"].starter == ("127.0.0.1", 4000)
    assert run(environment(1, 0), tmp_path, node_address="10.0.0.9", node_port=5) == 143
    assert made["where"][0] == "10.0.0.9:5"


def test_the_others_wait(roles: Roles, tmp_path: Path) -> None:
    for machine in range(2):
        assert run(environment(machine, 1), tmp_path, 99) == 0  # it is local rank 0 that refuses
    assert [role for role, _ in roles.called] == ["wait", "wait"]


def test_waiting_ends_at_a_signal() -> None:
    code = (
        "import signal; from tpserve.handler.torchrun import serve; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('here', flush=True); serve('x')"
    )
    env = os.environ | environment(0, 1)
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.parametrize("machine", [0, 1])
@pytest.mark.parametrize(
    ("tp", "options", "words"),
    [
        (2, {}, "tp is 2, but torchrun has 4 processes on 2 machines: leave it out, or make it 4"),
        (None, {"tensor_parallel_size": 8}, "tensor_parallel_size is 8"),
        (4, {"num_nodes": 1}, "num_nodes is 1.*make it 2"),
        (None, {"elastic": True}, "elastic is for one machine"),
        (None, {"prot": 1}, "unknown option 'prot'"),
    ],
)
def test_what_contradicts_is_refused_on_all_machines(
    machine: int, tp: int | None, options: dict[str, Any], words: str, roles: Roles, tmp_path: Path
) -> None:
    os.environ.update(environment(machine, 0))
    with pytest.raises(ConfigError, match=words):
        serve(str(tmp_path), tp, **options)
    assert roles.called == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LOCAL_WORLD_SIZE": "3"}, "must be the same on every machine"),
        ({"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "4", "RANK": "0"}, "must be the same on every machine"),
        ({"RANK": "1"}, "virtual-local-rank"),
        ({"WORLD_SIZE": "x"}, "invalid literal"),
        ({"GROUP_RANK": None}, "'GROUP_RANK'"),
        ({"MASTER_ADDR": None}, "'MASTER_ADDR'"),
    ],
)
def test_torchruns_that_are_no_places(changes: dict[str, str | None], words: str) -> None:
    env = {name: value for name, value in (environment(0, 0) | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        TorchrunPlace.read(env)


def test_a_store_that_torchrun_does_not_share_is_not_looked_at() -> None:
    env = environment(1, 0) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
    found = TorchrunPlace.read(env)
    assert found is not None
    assert found.store is None
    assert place(1, 0).store == ("127.0.0.1", 4000)


def test_a_head_that_others_would_not_find(roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"mine": "127.0.1.1", "seen": "10.0.0.1"}[name])
    os.environ.update(environment(0, 0) | {"MASTER_ADDR": "mine"})
    with pytest.raises(ConfigError, match=r"'mine', which is 127.0.1.1 here.*--local-addr or with --node_address"):
        serve(str(tmp_path))
    assert run(environment(0, 0) | {"MASTER_ADDR": "seen"}, tmp_path) == 143
    assert run(environment(0, 0) | {"MASTER_ADDR": "mine"}, tmp_path, node_address="10.0.0.1") == 143
    assert run(environment(0, 0, machines=1) | {"MASTER_ADDR": "mine"}, tmp_path) == 143  # nobody else looks for it

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    os.environ.update(environment(0, 0) | {"MASTER_ADDR": "other"})
    with pytest.raises(ConfigError, match="'other', which is no name here"):
        serve(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "kept"), [({}, None), ({"OMP_NUM_THREADS": "1"}, "1"), ({"OMP_NUM_THREADS": "4"}, "4")]
)
def test_threads_that_torchrun_chose_are_not_kept(given: dict[str, str], kept: str | None) -> None:
    """A parent that does what torchrun does with several processes a machine."""
    child = (
        "import os; from tpserve.handler.torchrun import _forget_torchrun; _forget_torchrun(); "
        "print(os.environ.get('OMP_NUM_THREADS'))"
    )
    code = (
        "import os, subprocess, sys; os.environ.setdefault('OMP_NUM_THREADS', '1'); "
        "os.environ['LOCAL_WORLD_SIZE'] = '2'; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    done = subprocess.run([sys.executable, "-c", code, child], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(kept)
