"""`tpserve serve` under torchrun, whose processes say where ranks belong: the ranks are the server's own.

docs/machines.md has the reasons.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tpserve.engine.errors import ConfigError
from tpserve.engine.node_agent import NodeAgent, OneLife, run_agent
from tpserve.engine.node_protocol import NodeKeys
from tpserve.engine.process import die_with_parent, environment_without_torchrun
from tpserve.handler import front
from tpserve.handler.front_config import FrontConfig

NODE_PORT = 29401  # the usual one is torchrun's own default for its rendezvous
_HEAD_S = 120.0  # all machines begin at the same time: so long may a head take to import and to listen
_ENDS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchrunPlace:
    """What torchrun tells one of its processes.

    Attributes:
        machine: its number; 0: the head.
        num_machines: how many there are.
        local_rank: of the process on its machine.
        num_ranks: processes on all machines.
        head: machine 0's address, or name.
        store: host and port at which machine 0's torchrun listens; None: it does not.
    """

    machine: int
    num_machines: int
    local_rank: int
    num_ranks: int
    head: str
    store: tuple[str, int] | None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> TorchrunPlace | None:
        """None: no torchrun started this.

        Raises:
            ConfigError: its processes cannot be places of one server.
        """
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        try:
            machine, rank, local_rank, num_here, num_ranks, port = (
                int(environment[name])
                for name in ("GROUP_RANK", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_PORT")
            )
            head = environment["MASTER_ADDR"]
        except (KeyError, ValueError) as e:
            raise ConfigError(
                f"TORCHELASTIC_RUN_ID is set, but torchrun's other variables are not as they should be: {e}; "
                "to serve without torchrun: env -u TORCHELASTIC_RUN_ID tpserve serve …"
            ) from None
        num_machines = num_ranks // num_here
        # All machines must come to the same result, also when only one of them is odd.
        if (
            num_machines * num_here != num_ranks
            or int(environment.get("GROUP_WORLD_SIZE", num_machines)) != num_machines
        ):
            raise ConfigError(
                f"torchrun has {num_ranks} processes, {num_here} of them here: "
                "--nproc-per-node must be the same on every machine"
            )
        if rank != machine * num_here + local_rank:
            raise ConfigError("torchrun's --virtual-local-rank leaves one GPU to each process: serve without it")
        store = (head, port) if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        return cls(
            machine=machine, num_machines=num_machines, local_rank=local_rank, num_ranks=num_ranks, head=head,
            store=store,
        )  # fmt: skip

    def options(self, tp: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of `tpserve serve`, with what follows from the places.

        Raises:
            ConfigError: they say something else.
        """
        merged = dict(options)
        for name, given, here in (
            ("tp", tp, self.num_ranks),
            ("tensor_parallel_size", options.get("tensor_parallel_size"), self.num_ranks),
            ("num_nodes", options.get("num_nodes"), self.num_machines),
        ):
            if given is not None and given != here:
                raise ConfigError(
                    f"{name} is {given}, but torchrun has {self.num_ranks} processes on {self.num_machines} machines: "
                    f"leave it out, or make it {here}"
                )
        merged |= {"tensor_parallel_size": self.num_ranks, "num_nodes": self.num_machines}
        if self.num_machines > 1:
            merged.setdefault("node_address", self.head)
            merged.setdefault("node_port", NODE_PORT)
        return merged


def serve(checkpoint: str, tp: int | None = None, announce: Callable[[str], None] = print, **options: Any) -> None:
    """`front.serve`, or this process's part of it if torchrun started it.

    Raises:
        ConfigError: it cannot be served so.
        EngineError: the engine did not come up, or has given up; an agent's head has ended.
        SystemExit: it was told to end; with a status for which torchrun ends the other places.
    """
    place = TorchrunPlace.read(os.environ)
    if place is None:
        front.serve(checkpoint, tp, announce, **options)
        return
    if os.getppid() != 1:  # torchrun may be a container's first process, and with that everything ends
        die_with_parent()
    if place.local_rank != 0:
        _wait_for_the_end()
    merged = place.options(tp, options)
    config = FrontConfig.from_options(checkpoint, None, merged)  # refused on all machines, not only on the head
    _forget_torchrun()
    if place.machine != 0:
        _run_agent(config, place)
    else:
        if "node_address" not in options and place.num_machines > 1:
            _check_head(place.head)
        front.serve(checkpoint, None, announce, **merged)
    # After a success torchrun would wait for the other places of this machine, and five minutes for the others'.
    sys.exit(128 + signal.SIGTERM)


def _wait_for_the_end() -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    signal.sigwait(_ENDS)
    sys.exit(0)


def _run_agent(config: FrontConfig, place: TorchrunPlace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s node %(levelname)s %(message)s")
    engine = config.handler.engine
    agent = NodeAgent(
        f"{engine.node_address}:{engine.node_port}",
        NodeKeys.load(engine.node_key_file),
        f"{socket.gethostname()}-{place.machine}",  # one host may be two machines, for a trial
        checkpoint=engine.checkpoint_dir,
        drain_timeout_s=config.drain_timeout_s,
        one_life=OneLife(_HEAD_S, place.store),
    )
    run_agent(agent)


def _check_head(name: str) -> None:
    """Refuses a name by which only this machine itself can reach it."""
    try:
        address = socket.gethostbyname(name)
    except OSError as e:
        raise ConfigError(f"torchrun calls this machine {name!r}, which is no name here ({e}): {_REMEDY}") from None
    if address != name and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(f"torchrun calls this machine {name!r}, which is {address} here: {_REMEDY}")


_REMEDY = "say where the others reach it, with torchrun's --local-addr or with --node_address"


def _forget_torchrun() -> None:
    """Takes away what torchrun has put into this process's environment: what is started from here is not its."""
    kept = environment_without_torchrun()
    # With several processes a machine torchrun sets it, for nobody's ranks: ours choose by the number of cores.
    if (
        kept.get("OMP_NUM_THREADS") == "1"
        and os.environ["LOCAL_WORLD_SIZE"] != "1"
        and not _parent_was_given("OMP_NUM_THREADS")
    ):
        del kept["OMP_NUM_THREADS"]
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]


def _parent_was_given(name: str) -> bool:
    """Whether the parent was started with this variable; True if the system does not tell."""
    try:
        lines = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(line.startswith(f"{name}=".encode()) for line in lines)
