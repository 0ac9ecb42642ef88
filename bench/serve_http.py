"""An HTTP client that times streams: asyncio's transports, h11's parser, and a clock read when bytes are there.

One process and one thread. The time of a chunk is that of the read that brought it, before anything of it is parsed;
chunks of one read have one time. Connections are kept and used again, as clients of a service do.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

import h11

from tpserve.bench.serve_events import ERROR_CHARS, Answer, Events

_IDLE_S = 2.0  # servers close idle connections after 5 s and more


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._events: Events | None = None
        self._status = 0
        self.body = b""  # of a reply that is no stream
        self._done: asyncio.Future[None] | None = None
        self.idle_since_s = 0.0
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def usable(self) -> bool:
        """It can take another request."""
        assert self._transport is not None
        return self._http.our_state is h11.IDLE and not self._transport.is_closing()

    async def ask(self, request: h11.Request, body: bytes, answer: Answer) -> int:
        """Sends a request and waits for the end of the reply; returns its status.

        Raises:
            ConnectionError: the connection ended first.
        """
        assert self._transport is not None
        self._answer, self._events, self.body, self._status = answer, None, b"", 0
        self._done = asyncio.get_running_loop().create_future()
        parts = [self._http.send(request), self._http.send(h11.Data(body)), self._http.send(h11.EndOfMessage())]
        answer.sent_s = time.perf_counter()
        self._transport.write(b"".join(part for part in parts if part))
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
        self.idle_since_s = time.perf_counter()
        return self._status

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        try:
            self._http.receive_data(data)
            self._read(now_s)
        except h11.RemoteProtocolError as e:
            self._end(ConnectionError(f"not HTTP: {e}"))

    def _read(self, now_s: float) -> None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                if self._events is not None:
                    self._events.feed(bytes(event.data), now_s)
                else:
                    self.body += bytes(event.data)
            elif isinstance(event, h11.Response):
                self._status = event.status_code
                streams = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in event.headers)
                if self._answer is not None and streams and event.status_code == 200:
                    self._events = Events(self._answer)
            elif isinstance(event, h11.EndOfMessage):
                self._end(None)
                return
            elif isinstance(event, h11.InformationalResponse):
                continue
            else:  # more is needed, it paused, or it was closed
                return

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        now_s = time.perf_counter()
        try:  # a reply without a length ends with the connection
            if self._http.their_state is h11.SEND_BODY:
                self._http.receive_data(b"")
                self._read(now_s)
        except h11.RemoteProtocolError as e:
            self._end(ConnectionError(f"ended in the middle: {e}"))
        self._end(ConnectionError(f"the connection ended: {exc or 'closed by the server'}"))

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)

    def close(self) -> None:
        """Ends it."""
        if self._transport is not None:
            self._transport.close()


class Client:
    """Connections to one server.

    Args:
        url: such as http://127.0.0.1:8080; a path stands before every other ("https://host/base").
        api_key: sent as a bearer token.
        timeout_s: of one request.

    Raises:
        ValueError: the URL is not one of HTTP.
    """

    def __init__(self, url: str, api_key: str = "", timeout_s: float = 600.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL such as http://127.0.0.1:8080")
        self._host, self._base = parts.hostname, parts.path.rstrip("/").removesuffix("/v1")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._headers = [("Host", parts.netloc.rpartition("@")[2]), ("Accept", "*/*")]
        if api_key:
            self._headers.append(("Authorization", f"Bearer {api_key}"))
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def stream(self, path: str, body: bytes, due_s: float) -> Answer:
        """One streamed answer; whatever goes wrong is its `error`."""
        answer = Answer(due_s)
        headers = [*self._headers, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = h11.Request(method="POST", target=self._base + path, headers=headers)
        try:
            status, said = await self._ask(request, body, answer)
            if status != 200:
                answer.error = f"status {status}: {said[:ERROR_CHARS].decode(errors='replace')}"
            elif not answer.error and not answer.heard_s:
                answer.error = "a reply without a token" + (f": {said[:ERROR_CHARS]!r}" if said else "")
            elif not answer.error and not answer.finished:
                answer.error = "the stream ended in the middle"
        except TimeoutError:
            answer.error = f"no end after {self._timeout_s:g} s"
        except OSError as e:
            answer.error = str(e) or type(e).__name__
        answer.ended_s = answer.ended_s or time.perf_counter()
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            OSError: there is no server, or it went away.
            TimeoutError: it did not answer.
        """
        request = h11.Request(method="GET", target=self._base + path, headers=self._headers)
        return await self._ask(request, b"", Answer(time.perf_counter()))

    async def _ask(self, request: h11.Request, body: bytes, answer: Answer) -> tuple[int, bytes]:
        async with asyncio.timeout(self._timeout_s):
            while True:
                connection, used_before = await self._connection()
                try:
                    status = await connection.ask(request, body, answer)
                except ConnectionError:
                    if used_before and not answer.heard_s:
                        continue  # the server had closed it: on the next one
                    raise
                if connection.usable:
                    self._idle.append(connection)
                return status, connection.body

    async def _connection(self) -> tuple[_Connection, bool]:
        now_s = time.perf_counter()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now_s - connection.idle_since_s < _IDLE_S:
                return connection, True
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        return connection, False

    async def close(self) -> None:
        """Ends its connections."""
        self._idle.clear()
        for connection in self._open:
            connection.close()
        if self._open:
            await asyncio.wait([connection.lost for connection in self._open], timeout=1)
