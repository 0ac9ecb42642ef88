"""Who is not let into a group over several machines: strangers, other programs, other checkpoints."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.engine.nodes import KEY, FakePart, agent, complete, over_two_machines, refusal, until, without_processes
from tpserve.engine import node_agent
from tpserve.engine.channel import new_socket
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.node_group import GroupOverNodes
from tpserve.engine.node_hub import NodeHub
from tpserve.engine.node_protocol import KEY_VARIABLE, NodeKeys, checkpoint_identity
from tpserve.engine.protocol import Waiting


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
