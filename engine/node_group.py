"""One life of a rank group that is spread over machines; to whoever keeps it, it is like one on this machine."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from pathlib import Path

import msgspec

from tpserve.engine.channel import ChannelKeys
from tpserve.engine.config import EngineConfig
from tpserve.engine.node_hub import Node, NodeHub
from tpserve.engine.node_place import Place
from tpserve.engine.node_protocol import Go, Kill, Launch, checkpoint_identity
from tpserve.engine.protocol import Event, Failed, Reply, Waiting
from tpserve.engine.supervisor import RankGroup

_SAY_S = 30.0  # between lines about machines that are not there

logger = logging.getLogger(__name__)


class GroupOverNodes:
    """See `RankGroup`. It is launched as soon as there are machines enough.

    Args:
        config: what the ranks are told.
        hub: knows the other machines.
    """

    def __init__(self, config: EngineConfig, hub: NodeHub) -> None:
        self.config = config
        self._hub = hub
        self._name = secrets.token_hex(8)
        self._nodes: list[Node] = []
        self._local: RankGroup | None = None
        self._may_go = False
        self._said_s = time.monotonic() - _SAY_S + 1  # in a second
        self._launch_if_complete()

    @property
    def pids(self) -> list[int]:
        """Of its processes on this machine."""
        return [] if self._local is None else self._local.pids

    @property
    def rank_pids(self) -> list[int]:
        """Of its ranks on this machine."""
        return [] if self._local is None else self._local.rank_pids

    @property
    def exit_status(self) -> int | None:
        """Of this machine's torchrun, once it has ended."""
        return None if self._local is None else self._local.exit_status

    @property
    def death(self) -> str | None:
        """What has ended, as words for a log; None while everything lives."""
        for node in self._nodes:  # first: what ends here often does because something ended there
            if node.lost is not None:
                return f"machine {node.name} is lost: {node.lost}"
            if self._name in node.ended:
                return f"machine {node.name}: {node.ended[self._name].reason}"
        return None if self._local is None else self._local.death

    @property
    def is_stopped(self) -> bool:
        """Whether one of its processes here is stopped; of the others' the agents tell that they have ended."""
        return self._local is not None and self._local.is_stopped

    def go(self) -> None:
        """Lets the ranks take their devices, load, and serve, now or when they have been launched; once."""
        self._may_go = True
        if self._local is not None:
            self._local.go()
            for node in self._nodes:
                self._hub.say(node, Go(self._name))

    def send(self, *events: Event) -> None:
        """Sends events to rank 0; see `RankGroup`."""
        if self._local is not None:
            self._local.send(*events)

    def receive(self, timeout_s: float) -> list[Reply]:
        """What rank 0 said; waits at most so long for the first word, or for the end of a process on this machine."""
        if self._hub.refusal is not None:
            return [Failed(self._hub.refusal)]
        if self._local is None:
            self._launch_if_complete()
        if self._local is None:
            time.sleep(timeout_s)
            return [Waiting()]
        replies = self._local.receive(timeout_s)
        refusals = [
            Failed(f"machine {node.name}: {ended.reason}")
            for node in self._nodes
            if (ended := node.ended.get(self._name)) is not None and ended.refused
        ]
        return [*replies, *refusals]

    def stop(self, timeout_s: float = 5.0) -> None:
        """Asks the group to end, then makes sure."""
        if self._local is not None:
            self._local.stop(timeout_s)
            self._local = None
        self.kill()

    def kill(self) -> None:
        """Kills every process of the group here, and has those elsewhere killed before anything else is done there."""
        for node in self._nodes:
            self._hub.say(node, Kill(self._name))
        if self._local is not None:
            self._local.kill()
        # A machine whose end ended this group is then known to be lost, and the next group does without.
        self._hub.flush()
        self._nodes, self._local = [], None

    def _launch_if_complete(self) -> None:
        wanted, nodes = self.config.num_nodes - 1, self._hub.nodes
        if len(nodes) < wanted:
            if self._may_go and time.monotonic() - self._said_s >= _SAY_S:
                self._said_s = time.monotonic()
                where = f"{self.config.node_address}:{self.config.node_port}"
                logger.warning("waiting at %s for %d of %d other machines", where, wanted - len(nodes), wanted)
            return
        self._nodes = nodes[:wanted]
        keys = ChannelKeys.draw()
        checkpoint = checkpoint_identity(Path(self.config.checkpoint_dir))
        host = socket.gethostbyname(self.config.node_address)
        # Bound here: everybody must know the port, and on loopback alone nobody else would find it.
        with socket.create_server((host, 0)) as store:
            port: int = store.getsockname()[1]
            self._local = RankGroup(self.config, Place(0, host, port, host, keys, store))
        others = msgspec.structs.replace(keys, server_secret="")
        for rank, node in enumerate(self._nodes, 1):
            self._hub.say(node, Launch(self._name, self.config, rank, host, port, others, checkpoint))
        if self._may_go:
            self.go()
