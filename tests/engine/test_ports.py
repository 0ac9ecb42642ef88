"""Ports that are held for servers yet to start."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tpserve.engine.ports import hold_port


def test_a_held_port_is_nobody_elses() -> None:
    """Of 28,000 ports 300 are held: 3,000 processes that ask for any would get about 32 of them."""
    with contextlib.ExitStack() as stack:
        held = {stack.enter_context(hold_port()).getsockname()[1] for _ in range(300)}
        assert len(held) == 300
        for _ in range(3_000):
            with socket.create_server(("127.0.0.1", 0)) as other:
                assert other.getsockname()[1] not in held
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for _ in range(3_000):
            with socket.create_connection(listening.getsockname()) as other:
                assert other.getsockname()[1] not in held
                listening.accept()[0].close()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", held.pop()))


def test_the_server_it_is_for_gets_it_again_and_again() -> None:
    async def serve(port: int) -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
        async with server:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", port))

    with hold_port() as held:
        port = held.getsockname()[1]
        for _ in range(3):
            asyncio.run(serve(port))
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            with hold_port() as other, socket.socket() as server:
                server.setsockopt(socket.SOL_SOCKET, option, 1)
                server.bind(other.getsockname())
                server.listen()
                with socket.create_connection(server.getsockname()):
                    server.accept()[0].close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))
