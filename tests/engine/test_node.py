"""A group over several machines, without processes: the head's hub and the agents."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.nodes import KEY, FakePart, agent, complete, over_two_machines, until, without_processes
from tpserve.engine import node_agent, node_hub
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.node_agent import NodeAgent, OneLife
from tpserve.engine.node_group import GroupOverNodes
from tpserve.engine.node_hub import NodeHub
from tpserve.engine.node_place import interface_of
from tpserve.engine.node_protocol import NodeKeys
from tpserve.engine.protocol import Failed, Waiting
from tpserve.engine.standby import Standby


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)


@pytest.fixture
def config(tiny_checkpoint: Path) -> Iterator[EngineConfig]:
    with over_two_machines(tiny_checkpoint) as config:
        yield config


@pytest.fixture
def hub(config: EngineConfig) -> Iterator[NodeHub]:
    made = NodeHub(config)
    yield made
    made.close()


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
