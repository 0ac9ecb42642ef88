"""`tpserve node`: the agent of a machine that holds ranks of a server on another one."""

from __future__ import annotations

import logging
import socket

from tpserve.engine.node_agent import NodeAgent, run_agent
from tpserve.engine.node_protocol import NodeKeys


def run(
    head: str,
    key_file: str | None,
    name: str | None,
    checkpoint: str | None,
    alive_file: str | None,
    drain_timeout_s: float,
) -> None:
    """Runs until it is told to end; see `tpserve.engine.node_agent.NodeAgent`.

    Raises:
        ConfigError: the key or the address cannot be.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s node %(levelname)s %(message)s")
    name = name or socket.gethostname()
    agent = NodeAgent(
        head,
        NodeKeys.load(key_file),
        name,
        checkpoint=checkpoint,
        alive_file=alive_file,
        drain_timeout_s=drain_timeout_s,
    )
    run_agent(agent)
