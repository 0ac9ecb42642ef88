"""`tpserve serve`: one process that speaks HTTP and keeps a rank group; it answers, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from tpserve.engine.client import EngineClient
from tpserve.engine.errors import EngineError, TpserveError
from tpserve.handler.accounts import access
from tpserve.handler.api_keys import ApiKeys
from tpserve.handler.asgi import Front, make_app
from tpserve.handler.backend import Backend
from tpserve.handler.front_config import FrontConfig
from tpserve.handler.http_server import Server, listen, make_server
from tpserve.handler.service import start_backend

_POLL_S = 0.05
_LAST_WORDS_S = 2.0  # for errors to be sent when the time to drain is over

logger = logging.getLogger(__name__)


def serve(checkpoint: str, tp: int | None = None, announce: Callable[[str], None] = print, **options: Any) -> None:
    """Serves until SIGTERM or SIGINT: then running requests may end; a second signal ends them.

    Args:
        checkpoint: a folder written by `tpserve convert`.
        tp: number of ranks.
        announce: told the URL when a token can be made.
        options: fields of `FrontConfig`, and keys of a yaml's `handler:` section.

    Raises:
        ConfigError: it cannot be served so.
        EngineError: the engine did not come up, or has given up.
        SystemExit: a second signal ended it.
    """
    config = FrontConfig.from_options(checkpoint, tp, options)
    keys = ApiKeys.read(config.api_key, config.api_key_file)
    _log_to_stderr(config.access_log)
    _allow_open_files(2 * config.max_connections + 1024)
    front = Front(config.limits, keys, config.model_name)
    server = make_server(make_app(front, config.origins), config)
    with listen(config.host, config.port) as listening:
        if not keys and not _is_loopback(config.host):
            logger.warning("%s may be reached from elsewhere, and no api_key is asked for", config.host)
        client = EngineClient(config.handler.engine)
        serving = _Serving(config, client, front, server, announce)
        try:
            asyncio.run(serving.run(listening))
        finally:
            client.close()
    if serving.hurried is not None:
        sys.exit(128 + serving.hurried)


class _Serving:
    """The life of the process, in its event loop."""

    def __init__(
        self, config: FrontConfig, client: EngineClient, front: Front, server: Server, announce: Callable[[str], None]
    ) -> None:
        self._config, self._client, self._front, self._server = config, client, front, server
        self._announce = announce
        self._stopping = asyncio.Event()
        self._start_error: TpserveError | None = None
        self.hurried: int | None = None  # by this signal

    async def run(self, listening: socket.socket) -> None:
        """Serves, from the first moment on: probes are answered while the engine starts."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        http = asyncio.create_task(self._server.serve(sockets=[listening]))
        url = _url(listening, self._config)
        # A thread of its own: should the engine never come up, nobody waits for it.
        threading.Thread(target=self._start, args=(loop, url), name="tpserve-start", daemon=True).start()
        failure: str | None = None
        try:
            while not (self._stopping.is_set() or http.done()):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), 4 * _POLL_S)
                failure = None if self._front.backend is None else self._client.failure  # `_start` has an earlier one
                if failure is not None:
                    break
            await self._drain()
        finally:
            self._server.should_exit = True
            await http
        if self._start_error is not None:
            raise self._start_error
        if failure is not None:
            raise EngineError(f"the engine has given up: {failure}")

    def _signalled(self, number: int) -> None:
        if not self._stopping.is_set():
            logger.info("%s: draining for up to %g s", signal.Signals(number).name, self._config.drain_timeout_s)
            self._stopping.set()
            return
        self.hurried = number
        self._server.force_exit = True
        for each in (signal.SIGTERM, signal.SIGINT):  # whoever is still impatient kills us, and the ranks with us
            asyncio.get_running_loop().remove_signal_handler(each)

    async def _drain(self) -> None:
        self._front.draining = True
        await self._until_idle(self._config.drain_timeout_s)
        if self._front.num_requests:
            logger.warning("%d requests are cut off", self._front.num_requests)
            self._front.fail_all("the server is shutting down")
            await self._until_idle(_LAST_WORDS_S)

    async def _until_idle(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._front.num_requests and self.hurried is None:
                    await asyncio.sleep(_POLL_S)

    # In a thread of its own.

    def _start(self, loop: asyncio.AbstractEventLoop, url: str) -> None:
        backend: Backend | None = None
        try:
            backend = start_backend(self._config.handler, self._client, self._config.model_name)
        except TpserveError as e:
            self._start_error = e
        except Exception as e:
            logger.exception("starting")
            self._start_error = EngineError(f"the engine could not be started: {e!r}")
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(self._started, backend, url)

    def _started(self, backend: Backend | None, url: str) -> None:
        if backend is None:
            self._stopping.set()
            return
        self._front.backend = backend
        self._announce(f"serving {self._config.model_name} at {url}")


def _url(listening: socket.socket, config: FrontConfig) -> str:
    scheme = "http" if config.ssl_certfile is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listening.getsockname()[1]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _allow_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _log_to_stderr(access_log: bool) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    access.propagate = False
    access.disabled = not access_log
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
