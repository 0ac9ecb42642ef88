"""One request on an ASGI server: reading it within limits, answering it, and noticing that nobody waits any more."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import uuid
from collections.abc import Callable, Mapping

from starlette.types import Receive, Scope, Send

from tpserve.handler.http import MAX_HEADERS
from tpserve.handler.refusals import Refusal
from tpserve.handler.replies import Reply

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# A client that is still sending when it is refused gets so long to read why.
_LINGER_S = 2.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the front takes in before any engine work.

    Attributes:
        max_request_bytes: of a body.
        max_header_bytes, max_headers: of a request's headers, names and values.
        max_url_bytes: of the path and the query.
        max_connections: requests at once.
        max_buffered_bytes: of all bodies that have not been answered yet.
        request_timeout_s: for a body, and for headers, to arrive.
    """

    max_request_bytes: int = 2 << 20
    max_header_bytes: int = 16 << 10
    max_headers: int = MAX_HEADERS
    max_url_bytes: int = 4 << 10
    max_connections: int = 1024
    max_buffered_bytes: int = 256 << 20
    request_timeout_s: float = 30.0


class ClientGone(Exception):  # noqa: N818 — nobody's error
    """Nobody waits for the answer."""


class Wire:
    """One request's two directions.

    Args:
        scope, receive, send: ASGI's.

    Attributes:
        method, path: of the request line; the path is decoded and has no query.
        headers: names in lower case.
        request_id: the client's, if it is fit to be repeated, else one of ours.
        status: of the reply; 0: none has begun.
        bytes_out: of the reply's body, so far.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str | None = scope["client"][0] if scope.get("client") else None
        self.headers = _headers(scope)
        asked = self.headers.get("x-request-id", "")
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        self.status = 0
        self.bytes_out = 0
        self._num_headers = len(scope["headers"])
        self._num_header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        self._num_url_bytes = len(scope.get("raw_path") or self.path) + len(scope.get("query_string", b""))
        self._receive, self._send = receive, send
        self._unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    def check_headers(self, limits: Limits) -> None:
        """Raises:
        Refusal: there are too many or they are too long, or the URL is.
        """
        if self._num_url_bytes > limits.max_url_bytes:
            raise Refusal(414, f"a URL may have {limits.max_url_bytes} bytes, this one has {self._num_url_bytes}")
        if self._num_headers > limits.max_headers:
            raise Refusal(431, f"a request may have {limits.max_headers} headers, this one has {self._num_headers}")
        if self._num_header_bytes > limits.max_header_bytes:
            raise Refusal(431, f"headers may have {limits.max_header_bytes} bytes, these have {self._num_header_bytes}")

    async def read_body(self, limits: Limits, arrived: Callable[[int], None]) -> bytes:
        """The body, when it has arrived.

        Args:
            limits: of its bytes and its time.
            arrived: told of its bytes as they come; may raise a `Refusal`.

        Raises:
            Refusal: it is too long, in a coding that nobody asked for, or too slow.
            ClientGone: it will not arrive.
        """
        coding = self.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise Refusal(415, f"bodies are taken as they are, not in Content-Encoding {coding[:40]!r}")
        announced = self.headers.get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > limits.max_request_bytes:
            raise _too_large(limits, int(announced[:20]))
        body = bytearray()
        try:
            async with asyncio.timeout(limits.request_timeout_s):
                while self._unread:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += (part := message.get("body", b""))
                    self._unread = message.get("more_body", False)
                    if len(body) > limits.max_request_bytes:
                        raise _too_large(limits, len(body))
                    arrived(len(part))
        except TimeoutError:
            raise Refusal(408, f"the body has not arrived within {limits.request_timeout_s:g} s") from None
        return bytes(body)

    async def wait_until_gone(self) -> None:
        """Returns when the client has gone, or has had its whole answer. Call it after `read_body`."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, reply: Reply, *headers: tuple[str, str], length: int | None = None) -> None:
        """Sends the status and the headers.

        Args:
            reply: the first, which fixes them.
            headers: further ones.
            length: of the whole body, if it is known.
        """
        self.status = reply.status
        named = {
            "content-type": reply.content_type,
            "x-request-id": self.request_id,
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        named |= {name.lower(): value for name, value in (*reply.headers, *headers)}
        if length is not None:
            named["content-length"] = str(length)
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": reply.status, "headers": raw})

    async def send(self, body: bytes, more: bool) -> None:
        """Sends a part of the body; `more` when others follow."""
        self.bytes_out += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, reply: Reply, *headers: tuple[str, str]) -> None:
        """Sends a whole reply.

        When the request has not been read to its end, the connection is closed after it; but not at once, for then the
        kernel would throw the reply away before the client, who is still sending, looks at it.
        """
        if not self._unread:
            await self.begin(reply, *headers, length=len(reply.body))
            await self.send(reply.body, more=False)
            return
        await self.begin(reply, *headers, ("connection", "close"), length=len(reply.body))
        await self.send(reply.body, more=True)
        try:
            async with asyncio.timeout(_LINGER_S):
                while self._unread:
                    message = await self._receive()
                    self._unread = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            pass
        await self.send(b"", more=False)


def _headers(scope: Scope) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _too_large(limits: Limits, at_least: int) -> Refusal:
    said = f"a body may have {limits.max_request_bytes} bytes (max_request_bytes), this one has {at_least} or more"
    return Refusal(413, said)
