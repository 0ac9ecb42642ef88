"""torchrun's store on one interface: by itself it listens on every one, whatever --master-addr says."""

from __future__ import annotations

import datetime
import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous


def listen_on_loopback() -> int:
    """Takes a port for the store of the `torchrun` that this process is about to become.

    Anybody who can connect to the store may read and write it: with it, a stranger could join the group or end it.

    Returns:
        the port, which is held from now on: nobody else can take it before torchrun does.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    listen_on(listening)
    return port


def listen_on(listening: socket.socket) -> None:
    """Gives the store of the `torchrun` that this process is about to become a socket that listens already."""

    def store(
        host: str, port: int, world_size: int, is_master: bool, timeout: datetime.timedelta, multi_tenant: bool
    ) -> TCPStore:
        return TCPStore(
            host, port, world_size, is_master, timeout, multi_tenant=multi_tenant, master_listen_fd=listening.detach()
        )

    static_tcp_rendezvous.TCPStore = store  # type: ignore[assignment, attr-defined]  # the one place that makes it
