"""A free port of this machine for a server that is yet to start, and that nobody else gets until it does."""

from __future__ import annotations

import socket


def hold_port() -> socket.socket:
    """A free TCP port on 127.0.0.1, held.

    A port that is only looked up and let go is anybody's until the server binds it: the kernel hands it to the next
    process that asks for any port, or connects somewhere, which a group of ranks does often. A bound socket keeps the
    kernel from that. As it never listens and may be shared, a server that has SO_REUSEADDR (of asyncio, Netty, Go, …)
    or SO_REUSEPORT binds the same port all the same, and may do so again after it ended.

    Returns:
        the socket; its `getsockname()[1]` is the port. Close it when the server is no longer to start.
    """
    holding = socket.socket()
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            holding.setsockopt(socket.SOL_SOCKET, option, 1)
        holding.bind(("127.0.0.1", 0))
    except OSError:
        holding.close()
        raise
    return holding
