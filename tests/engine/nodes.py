"""A group over several machines without processes: its parts are fakes, its agents threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tpserve.engine import node_agent, node_group
from tpserve.engine.config import EngineConfig
from tpserve.engine.node_agent import NodeAgent
from tpserve.engine.node_group import GroupOverNodes
from tpserve.engine.node_place import Place
from tpserve.engine.node_protocol import KEY_VARIABLE, NodeKeys
from tpserve.engine.ports import hold_port
from tpserve.engine.protocol import Failed, Reply, Waiting

KEY = "0123456789abcdef" * 2


class FakePart:
    """A `RankGroup` that does nothing; remembers where it is."""

    all: list[FakePart]

    def __init__(self, config: EngineConfig, place: Place) -> None:
        self.config, self.place = config, place
        self.has_gone = self.killed = self.is_stopped = False
        self.death: str | None = None
        self.exit_status: int | None = None
        self.pids: list[int] = []
        self.rank_pids: list[int] = []
        FakePart.all.append(self)

    def go(self) -> None:
        self.has_gone = True

    def receive(self, timeout_s: float) -> list[Reply]:
        time.sleep(timeout_s)
        return []

    def stop(self, timeout_s: float) -> None:
        self.kill()

    def kill(self) -> None:
        assert not self.killed
        self.killed = True


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups and agents have the key, and parts that do nothing."""
    FakePart.all = []
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(node_agent, "RankGroup", FakePart)
    monkeypatch.setattr(node_group, "RankGroup", FakePart)


@contextlib.contextmanager
def over_two_machines(checkpoint: Path) -> Iterator[EngineConfig]:
    """A group of two machines, both of which are this one."""
    with hold_port() as held:
        yield EngineConfig(
            checkpoint_dir=str(checkpoint), tensor_parallel_size=4, num_nodes=2, node_address="127.0.0.1",
            node_port=held.getsockname()[1],
        )  # fmt: skip


@contextlib.contextmanager
def agent(config: EngineConfig, name: str = "b", key: str = KEY, **options: Any) -> Iterator[NodeAgent]:
    one = NodeAgent(f"127.0.0.1:{config.node_port}", NodeKeys.derive(key), name, drain_timeout_s=0, **options)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield one
    finally:
        one.leave()
        thread.join(10)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def complete(group: GroupOverNodes) -> list[FakePart]:
    """Both parts, when the group has been launched."""
    until(lambda: group.receive(0.01) != [Waiting()] and len(FakePart.all) >= 2)
    parts: list[FakePart] = FakePart.all[-2:]
    return sorted(parts, key=lambda part: part.place.rank)


def refusal(group: GroupOverNodes) -> str:
    """Why the group says that it cannot be."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        for reply in group.receive(0.01):
            if isinstance(reply, Failed):
                return reply.message
    raise AssertionError("it does not")
