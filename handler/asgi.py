"""The second front: an ASGI application over `Backend.serve`. It knows paths, limits and keys, and no protocol."""

from __future__ import annotations

import asyncio
import time
import uuid

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tpserve.handler import paths
from tpserve.handler.accounts import Accounts
from tpserve.handler.api_keys import ApiKeys
from tpserve.handler.backend import Backend
from tpserve.handler.http import HttpRequest
from tpserve.handler.open_request import Pending
from tpserve.handler.page_files import PAGE, PAGE_HEADERS
from tpserve.handler.refusals import Refusal, refusal_reply
from tpserve.handler.replies import Reply, json_reply
from tpserve.handler.wakeups import Wakeup, Wakeups
from tpserve.handler.wire import ClientGone, Limits, Wire

_CLIENT_GONE = 499  # nginx's word for it, in the log only
_LATER = {"Retry_After": "5"}


class Front:
    """The application. Everything happens in its event loop's thread.

    Args:
        limits: see `Limits`.
        keys: who may ask.
        model_name: what `/predictions/…` calls the model.

    Attributes:
        backend: None while the engine starts: what needs it is answered 503.
        draining: no new requests are taken.
    """

    def __init__(self, limits: Limits, keys: ApiKeys, model_name: str) -> None:
        self.backend: Backend | None = None
        self.draining = False
        self._limits, self._keys, self._model_name = limits, keys, model_name
        self._wakeups: Wakeups | None = None
        self._num_requests = 0
        self._num_buffered = 0
        self._running: dict[Pending, Wakeup] = {}
        self._accounts = Accounts()

    @property
    def num_requests(self) -> int:
        """Requests that are being answered."""
        return self._num_requests

    def fail_all(self, message: str) -> None:
        """Ends every request with an error."""
        for pending, wakeup in self._running.items():
            pending.fail(message)
            wakeup.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        assert scope["type"] == "http", "lifespan and websockets are off"
        started_s = time.perf_counter()
        wire = Wire(scope, receive, send)
        inner = paths.inner_path(wire.path, self._model_name)
        self._num_requests += 1
        try:
            try:
                await self._answer(wire, inner)
            except Refusal as refusal:
                await wire.reply(refusal_reply(inner or "", refusal), *self._closing())
        except ClientGone:
            wire.status = _CLIENT_GONE
        except Exception:  # uvicorn logs it, and answers if nobody has
            wire.status = wire.status or 500
            raise
        finally:
            self._num_requests -= 1
            self._accounts.ended(wire, inner, time.perf_counter() - started_s)

    async def _answer(self, wire: Wire, inner: str | None) -> None:
        wire.check_headers(self._limits)
        page = PAGE.get(wire.path)
        if page is not None:
            _check_method(wire, ("GET", "HEAD"))
            await wire.reply(page, *PAGE_HEADERS)
            return
        if inner is None or not paths.is_open(inner):
            if not self._keys.allow(wire.headers):
                raise Refusal(401, "no valid API key; send 'Authorization: Bearer KEY'", WWW_Authenticate="Bearer")
            if self._num_requests > self._limits.max_connections:
                raise Refusal(503, f"{self._limits.max_connections} requests are open already", Retry_After="1")
        if inner is None:
            raise Refusal(404, f"there is no such model; this one is called {self._model_name!r}")
        if paths.family(inner) is None:
            raise Refusal(404, f"there is nothing at /{inner}; known: {paths.known_paths()}")
        _check_method(wire, paths.methods(inner))
        reply = self._of_ours(inner)
        if reply is not None:
            await wire.reply(reply, *self._closing())
            return
        if self.backend is None:
            raise Refusal(503, "the engine is starting", **_LATER)
        if self.draining and wire.method not in ("GET", "HEAD"):
            raise Refusal(503, "the server is shutting down", **_LATER)
        if wire.method in ("GET", "HEAD"):
            await self._serve(wire, self.backend, _request(wire, inner, b""))
        else:
            await self._read_and_serve(wire, self.backend, inner)

    async def _read_and_serve(self, wire: Wire, backend: Backend, inner: str) -> None:
        held = 0

        def arrived(num_bytes: int) -> None:
            # What has come counts, not what was announced: slow senders hold little.
            nonlocal held
            if self._num_buffered + num_bytes > self._limits.max_buffered_bytes:
                raise Refusal(503, "too many bytes of requests are waiting already", Retry_After="1")
            held += num_bytes
            self._num_buffered += num_bytes

        try:
            body = await wire.read_body(self._limits, arrived)
            if self.draining:
                raise Refusal(503, "the server is shutting down", **_LATER)
            await self._serve(wire, backend, _request(wire, inner, body))
        finally:
            self._num_buffered -= held

    async def _serve(self, wire: Wire, backend: Backend, request: HttpRequest) -> None:
        if self._wakeups is None:
            self._wakeups = Wakeups(asyncio.get_running_loop())
        wakeup = Wakeup(self._wakeups)
        # Not the client's id: two clients may send the same.
        opened = backend.serve(uuid.uuid4().hex, request, wakeup)
        if isinstance(opened, Reply):
            if request.path == "metrics":
                opened = Reply(opened.body + self._accounts.metrics(), opened.content_type)
            await wire.reply(opened, *self._closing())
            return
        self._running[opened] = wakeup
        watch = asyncio.create_task(wire.wait_until_gone())
        watch.add_done_callback(lambda _: wakeup.set())
        try:
            await _relay(wire, opened, wakeup, watch)
        finally:
            watch.cancel()
            del self._running[opened]
            backend.cancel(opened)  # one of several prompts may have failed while others go on

    def _of_ours(self, inner: str) -> Reply | None:
        """What the front can say without a backend, or in spite of it."""
        if inner in ("health/live", "v2/health/live"):
            return json_reply({"status": "alive"})
        if inner not in ("health", "health/ready", "v2/health/ready"):
            return None
        if self.draining:
            return json_reply({"status": "draining", "reason": "the server is shutting down"}, 503)
        if self.backend is None:
            return json_reply({"status": "unavailable", "reason": "the engine is starting"}, 503)
        return None

    def _closing(self) -> tuple[tuple[str, str], ...]:
        return (("connection", "close"),) if self.draining else ()


def make_app(front: Front, allowed_origins: tuple[str, ...]) -> ASGIApp:
    """The application, with leave for other sites' pages to ask."""
    if not allowed_origins:
        return front
    return CORSMiddleware(
        front,
        allow_origins=allowed_origins,
        allow_methods=("GET", "POST", "PUT"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )


async def _relay(wire: Wire, opened: Pending, wakeup: Wakeup, watch: asyncio.Task[None]) -> None:
    """Sends replies as they come, what is there at once in one piece."""
    begun = False
    while True:
        replies: list[Reply] = []
        while not replies or replies[-1].more is True:
            reply = opened.take()
            if reply is None:
                break
            replies.append(reply)
        if watch.done():
            raise ClientGone
        if replies:
            first, more = replies[0], replies[-1].more is True
            if not begun and first.more is None:
                await wire.reply(first)
                return
            if not begun:
                begun = True
                await wire.begin(first, ("x-accel-buffering", "no"))  # nginx would gather chunks
            await wire.send(b"".join(one.body for one in replies), more)
            if not more:
                return
        await wakeup.wait()


def _check_method(wire: Wire, allowed: tuple[str, ...] | None) -> None:
    if allowed is not None and wire.method not in allowed:
        raise Refusal(405, f"{wire.method[:20]} is not for this path; use {allowed[0]}", Allow=", ".join(allowed))


def _request(wire: Wire, path: str, body: bytes) -> HttpRequest:
    headers = {name: value for name, value in wire.headers.items() if name != "authorization"}
    return HttpRequest(path, body, headers.get("content-type", ""), headers, wire.method)
