"""Where a part of a rank group runs that is spread over machines, and through which interface it speaks."""

from __future__ import annotations

import dataclasses
import socket
import struct
import sys

from tpserve.engine.channel import ChannelKeys

_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclasses.dataclass(frozen=True)
class Place:
    """One machine's part of a group.

    Attributes:
        rank: of the machine, 0: where rank 0 is.
        address, port: torchrun's store.
        own_address: of this machine, as the others reach it.
        keys: of the ranks' channel; without the server's secret but on machine 0.
        store: on machine 0: the socket of the store, which listens already.
    """

    rank: int
    address: str
    port: int
    own_address: str
    keys: ChannelKeys
    store: socket.socket | None = None


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None: there is none, or the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                # netdevice(7): a name of 16 bytes, then a sockaddr_in, whose address begins 4 bytes further.
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def address_towards(host: str, port: int, timeout_s: float) -> str:
    """This machine's address as `host` sees it, where somebody listens at that port.

    Raises:
        OSError: the name is unknown, there is no way there, or nobody listens.
    """
    with socket.create_connection((host, port), timeout_s) as asking:
        address: str = asking.getsockname()[0]
        return address
