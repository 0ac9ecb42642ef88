"""The second front on a real socket, over an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.handler.fakes import FakeEngine, backend
from tpserve.handler.api_keys import ApiKeys
from tpserve.handler.asgi import Front, make_app
from tpserve.handler.front_config import FrontConfig
from tpserve.handler.http_server import listen, make_server

PREDICT, CHAT, TEXT, TRITON = (
    "/predictions/llama", "/v1/chat/completions", "/v1/completions", "/v2/models/llama/generate",
)  # fmt: skip


class Answer:
    """A whole HTTP reply; header names in lower case."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Web:
    """A running front; see `serving`."""

    def __init__(self, front: Front, engine: FakeEngine, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.front, self.engine, self.loop, self.port = front, engine, loop, port

    @contextlib.contextmanager
    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request, bytes or anything else as JSON; yields the response when its headers are there."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)) as connection:
            encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, encoded, {"Content-Type": "application/json", **(headers or {})})
            with connection.getresponse() as response:
                yield response

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        with self.request(method, path, body, headers) as response:
            return Answer(response)

    @contextlib.contextmanager
    def raw(self, head: str, body: bytes = b"") -> Iterator[socket.socket]:
        """A connection on which these lines have been sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + body)
            yield connection

    def submitted(self, at_least: int = 1) -> list[str]:
        """The engine's ids of open requests, when there are so many."""
        wait_for(lambda: len(self.engine.submitted) >= at_least)
        return list(self.engine.submitted)


@contextlib.contextmanager
def serving(
    keys: tuple[str, ...] = (), ready: bool = True, engine: FakeEngine | None = None, **options: Any
) -> Iterator[Web]:
    """A front with these keys and options; with `ready` false its engine is still starting."""
    config = FrontConfig.from_options("nowhere", None, options)
    engine = engine or FakeEngine()
    front = Front(config.limits, ApiKeys(keys), "llama")
    front.backend = backend(engine) if ready else None
    server = make_server(make_app(front, config.origins), config)
    with listen("127.0.0.1", 0) as listening:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve([listening]),))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Web(front, engine, loop, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            loop.close()
    assert front.num_requests == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns when the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.005)
