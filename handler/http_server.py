"""uvicorn as the second front runs it: with time limits that it does not have, and its signals left to us."""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
import ssl
import sys
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tpserve.engine.errors import ConfigError
from tpserve.handler.front_config import FrontConfig

# Connections beyond `max_connections`: idle ones, probes, and those that are told to come later.
_SPARE_CONNECTIONS = 256
_STALLED_MS = 60_000
# Forward secrecy and authenticated encryption; uvicorn's own choice leaves TLS 1.2 with neither.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Protocol(H11Protocol):
    """One connection. uvicorn would wait for its headers for ever."""

    headers_timeout_s = 30.0
    most_connections = 1024

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.write(_BUSY)
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Starts the clock, if nothing is being answered: what has come is no whole request, or the rest of one."""
        if not self.transport.is_closing():
            super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong with headers that are too long."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        phrase = http.HTTPStatus(status).phrase
        body = f"{phrase}\n".encode()
        head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
        self.transport.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.headers_timeout_s, self._expired)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        self.transport.abort()


class Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def make_server(app: ASGIApp, config: FrontConfig) -> Server:
    """A server that is not running.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    limits = config.limits
    protocol = type(
        "Protocol",
        (Protocol,),
        {
            "headers_timeout_s": limits.request_timeout_s,
            "most_connections": limits.max_connections + _SPARE_CONNECTIONS,
        },
    )
    settings = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_graceful_shutdown=2,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_NONE if config.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        ssl_ciphers=_CIPHERS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        settings.load()
    except OSError as e:  # ssl.SSLError is one
        raise ConfigError(f"ssl_certfile, ssl_keyfile, ssl_ca_certs: {e}") from None
    return Server(settings)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: it cannot be bound.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}, port {port}: {e}") from None
    # Accepted ones inherit it: peers that have vanished, or read nothing, do not keep their connections.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _STALLED_MS // 2000)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    return listening
