"""A group over several machines, without processes: the head's hub, the agents, and what keeps strangers out."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tpserve.engine import node_agent, node_group, node_hub
from tpserve.engine.channel import new_socket
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.node_agent import NodeAgent, OneLife
from tpserve.engine.node_group import GroupOverNodes
from tpserve.engine.node_hub import NodeHub
from tpserve.engine.node_place import Place, interface_of
from tpserve.engine.node_protocol import KEY_VARIABLE, NodeKeys, checkpoint_identity
from tpserve.engine.protocol import Failed, Reply, Waiting
from tpserve.engine.standby import Standby

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


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePart.all = []
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(node_agent, "RankGroup", FakePart)
    monkeypatch.setattr(node_group, "RankGroup", FakePart)


@pytest.fixture
def config(tiny_checkpoint: Path) -> EngineConfig:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return EngineConfig(
        checkpoint_dir=str(tiny_checkpoint), tensor_parallel_size=4, num_nodes=2, node_address="127.0.0.1",
        node_port=port,
    )  # fmt: skip


@pytest.fixture
def hub(config: EngineConfig) -> Iterator[NodeHub]:
    made = NodeHub(config)
    yield made
    made.close()


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


def test_a_group_waits_for_its_machines_and_is_launched_on_all(config: EngineConfig, hub: NodeHub) -> None:
    group = GroupOverNodes(config, hub)
    assert group.receive(0.01) == [Waiting()]
    assert group.death is None
    group.go()
    with agent(config):
        here, there = complete(group)
        until(lambda: here.has_gone and there.has_gone)
        assert here.config == there.config == config
        assert (here.place.rank, there.place.rank) == (0, 1)
        assert here.place.port == there.place.port > 0
        assert here.place.store is not None
        assert there.place.store is None
        assert there.place.keys.server_secret == ""  # which is rank 0's alone
        assert there.place.keys.server_key == here.place.keys.server_key
        second = GroupOverNodes(config, hub)  # as one that stands by
        until(lambda: len(FakePart.all) == 4)
        assert not any(part.has_gone for part in FakePart.all[2:])
        there.death = "it died"
        until(lambda: group.death == "machine b: it died")
        group.kill()
        until(lambda: there.killed and here.killed)
        assert second.death is None
        second.stop()
        until(lambda: all(part.killed for part in FakePart.all))


def test_a_machine_that_goes_and_comes_back(config: EngineConfig, hub: NodeHub) -> None:
    with agent(config):
        group = GroupOverNodes(config, hub)
        _, there = complete(group)
    assert there.killed  # whoever leaves, kills
    until(lambda: group.death == "machine b is lost: the connection is closed")
    group.kill()
    assert hub.nodes == []
    after = GroupOverNodes(config, hub)
    assert after.receive(0.01) == [Waiting()]
    with agent(config):
        complete(after)
        assert after.death is None
        after.kill()


def test_an_agent_outlives_its_head(config: EngineConfig, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    with agent(config, alive_file=str(alive)):
        for life in range(2):
            standby = Standby(True)
            group = standby.take(config)
            complete(group)  # type: ignore[arg-type]
            until(lambda: alive.read_text() == "connected\n")
            group.kill()
            standby.close()  # and its hub
            until(lambda: all(part.killed for part in FakePart.all))
            assert len(FakePart.all) == 2 * life + 2
            until(lambda: alive.read_text() == "waiting\n")


def end_of(config: EngineConfig, one_life: OneLife) -> queue.SimpleQueue[str]:
    """An agent for one life; what it ends with comes when it does."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    one = NodeAgent(f"127.0.0.1:{config.node_port}", NodeKeys.derive(KEY), "b", one_life=one_life)

    def run() -> None:
        try:
            one.run()
        except EngineError as e:
            said.put(str(e))

    threading.Thread(target=run, daemon=True).start()
    return said


def test_an_agent_for_one_life_of_its_head(config: EngineConfig) -> None:
    said = end_of(config, OneLife(60.0, None))
    time.sleep(0.3)
    assert said.empty()  # it waits for the beginning
    hub = NodeHub(config)
    until(lambda: hub.nodes)
    time.sleep(0.3)  # it hears something
    hub.close()
    assert "refused" in said.get(timeout=5)


def test_an_agent_for_a_life_that_does_not_begin(config: EngineConfig) -> None:
    assert "refused" in end_of(config, OneLife(0.5, None)).get(timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as starter:
        where = starter.getsockname()[:2]
        said = end_of(config, OneLife(60.0, where))
        time.sleep(1.2)
        assert said.empty()  # there is who could begin it
    assert "refused" in said.get(timeout=5)


def test_an_agent_for_one_life_that_is_not_wanted(
    config: EngineConfig, hub: NodeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_agent, "versions", lambda: "tpserve 0")
    assert "does not want machine b" in end_of(config, OneLife(60.0, None)).get(timeout=5)


def test_who_has_another_key_is_not_let_in(config: EngineConfig, hub: NodeHub) -> None:
    with agent(config, key="f" * 32):
        time.sleep(0.5)
        assert hub.nodes == []


def test_the_heads_public_key_is_not_enough(config: EngineConfig, hub: NodeHub) -> None:
    """Nor is being able to connect."""
    public, secret = zmq.curve_keypair()
    keys = {
        "curve_serverkey": NodeKeys.derive(KEY).head_public, "curve_publickey": public, "curve_secretkey": secret,
    }  # fmt: skip
    for options in (keys, {}):
        stranger = new_socket(zmq.DEALER, f"tcp://127.0.0.1:{config.node_port}", bind=False, immediate=1, **options)
        assert not stranger.poll(500, zmq.POLLOUT)
        stranger.close()
    with socket.create_connection(("127.0.0.1", config.node_port)) as stranger_too:
        stranger_too.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    with agent(config):
        until(lambda: hub.nodes)


def test_an_agent_obeys_only_who_has_the_key(config: EngineConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "f" * 32)
        stranger = NodeHub(config)
    try:
        group = GroupOverNodes(config, stranger)
        with agent(config):
            time.sleep(0.5)
            assert group.receive(0.01) == [Waiting()]
            assert FakePart.all == []
    finally:
        stranger.close()


def test_another_program_is_refused(config: EngineConfig, hub: NodeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_agent, "versions", lambda: "tpserve 0")
    with agent(config):
        time.sleep(0.5)
        assert hub.nodes == []


def test_two_machines_cannot_have_one_name(config: EngineConfig, hub: NodeHub) -> None:
    with agent(config):
        until(lambda: hub.nodes)
        (first,) = hub.nodes
        with agent(config):
            time.sleep(0.5)
            assert hub.nodes == [first]
        with agent(config, name="c"):
            until(lambda: [node.name for node in hub.nodes] == ["b", "c"])


def test_another_checkpoint_is_refused(config: EngineConfig, hub: NodeHub, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(config.checkpoint_dir, copy)
    with agent(config, checkpoint=str(copy)):  # the same one elsewhere is not
        group = GroupOverNodes(config, hub)
        _, there = complete(group)
        assert there.config.checkpoint_dir == str(copy)
        group.kill()
    until(lambda: not hub.nodes)
    (copy / "manifest.json").write_text("{}")
    for other, words in ((copy, "another checkpoint"), (tmp_path / "none", "does not exist")):
        with agent(config, checkpoint=str(other)):
            group = GroupOverNodes(config, hub)
            assert words in refusal(group)
            group.kill()
        until(lambda: not hub.nodes)


def test_foreign_checkpoints_are_compared_without_times(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    a, b = tmp_path / "a", tmp_path / "b"
    assert checkpoint_identity(a) == checkpoint_identity(b)
    os.utime(b / "config.json", (0, 0))
    assert checkpoint_identity(a) == checkpoint_identity(b)
    (b / "model.safetensors").write_bytes(b"1")
    assert checkpoint_identity(a) != checkpoint_identity(b)


def test_silence_is_a_loss(config: EngineConfig, hub: NodeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_hub, "SILENCE_S", 0.5)
    monkeypatch.setattr(node_agent, "PING_S", 1e9)
    with agent(config):
        until(lambda: hub.nodes)
        (node,) = hub.nodes
        until(lambda: node.lost == "it was silent for 0.5 s")


def test_a_head_that_cannot_wait_says_why(config: EngineConfig, hub: NodeHub) -> None:
    second = NodeHub(config)
    try:
        assert second.refusal is not None
        assert "in use" in second.refusal
        assert GroupOverNodes(config, second).receive(0.0) == [Failed(second.refusal)]
    finally:
        second.close()


def test_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    assert NodeKeys.load(str(tmp_path / "key")) == NodeKeys.load(None) == NodeKeys.derive(KEY)
    keys = NodeKeys.derive(KEY)
    assert len({keys.head_public, keys.head_secret, keys.node_public, keys.node_secret}) == 4
    assert keys != NodeKeys.derive(KEY[::-1])
    with pytest.raises(ConfigError, match="32 at least"):
        NodeKeys.derive(KEY[:-1])
    with pytest.raises(ConfigError, match="cannot be read"):
        NodeKeys.load(str(tmp_path / "none"))
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match=KEY_VARIABLE):
        NodeKeys.load(None)


def test_configuration() -> None:
    for wrong, words in (
        ({"tensor_parallel_size": 3}, "multiple of num_nodes"),
        ({"node_address": ""}, "node_address"),
        ({"elastic": True}, "elastic"),
        ({"num_nodes": 0}, "num_nodes must be positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            EngineConfig(
                **{"checkpoint_dir": "x", "tensor_parallel_size": 2, "num_nodes": 2, "node_address": "h"} | wrong
            )
    for head in ("host", ":1", "host:", "host:99999", "host:x"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            NodeAgent(head, NodeKeys.derive(KEY), "b")


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
