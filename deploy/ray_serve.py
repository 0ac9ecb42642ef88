"""Ray Serve: groups of ranks that come and go with the load, behind one address with the protocols of `tpserve serve`.

    serve run deploy.ray_serve:app checkpoint=/models/llama-3.1-8b tp=2 max_replicas=4      # on a Ray cluster
    python deploy/ray_serve.py checkpoint=/models/llama-3.1-8b tp=2 max_replicas=4          # with a Ray of its own

    Ray's HTTP proxy ─▶ Gateway: forwards, and asks another group if one dies ─▶ Group 1 … n: ASGI front, engine, ranks

A Group is what `tpserve serve` is, with Ray in the place of the socket. Its ranks are processes below it, so that Ray
knows one actor that needs all of their devices, in a placement group of one bundle: on one machine. Arguments are
those of `settings` and every option of `tpserve serve`; `docs` is deploy/README.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
import yaml
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tpserve.engine.client import EngineClient
from tpserve.engine.errors import ConfigError
from tpserve.handler.api_keys import ApiKeys
from tpserve.handler.asgi import Front, make_app
from tpserve.handler.front_config import FrontConfig
from tpserve.handler.service import start_backend

# A request that was with so many groups when they died is not given to another.
_ATTEMPTS = 3
_HEALTH_PERIOD_S = 5.0

logger = logging.getLogger("ray.serve")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is said to Ray; everything else is `tpserve serve`'s.

    Attributes:
        checkpoint: at the same path on every machine.
        tp: ranks of a group.
        gpus: of a group; None: as many as ranks, none with device=cpu.
        cpus: of a group.
        min_replicas, max_replicas: groups.
        target_ongoing_requests: of a group; with more on average there will be another.
        gateways: processes that forward; a request is lost with the one that it is in.
        unready_timeout_s: Ray replaces a group that could make no token for so long; the engine replaces its own ranks
            in the meantime. One that has given up is replaced at once.
    """

    checkpoint: str
    tp: int = 1
    gpus: float | None = None
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 32
    gateways: int = 1
    unready_timeout_s: float = 600.0


class Group:
    """One engine with its ranks, and the ASGI front before it.

    Args:
        checkpoint, tp, options: see `FrontConfig.from_options`.
        unready_timeout_s: see `Settings`.

    Raises:
        ConfigError, EngineError: it cannot be served; Ray tries again, and says why in `serve status`.
    """

    def __init__(self, checkpoint: str, tp: int, options: Mapping[str, Any], unready_timeout_s: float) -> None:
        config = FrontConfig.from_options(checkpoint, tp, options)
        front = Front(config.limits, ApiKeys.read(config.api_key, config.api_key_file), config.model_name)
        self._app = make_app(front, config.origins)
        self._unready_timeout_s = unready_timeout_s
        self._client = EngineClient(config.handler.engine)
        try:
            front.backend = start_backend(config.handler, self._client, config.model_name)
        except BaseException:
            self._client.close()
            raise
        self._ready_s = time.monotonic()

    async def answer(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[list[dict[str, Any]]]:
        """What the front sends for one request, ASGI's messages, as many at a time as there are.

        Args:
            scope: ASGI's, of plain values.
            body: the whole.
        """
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.put_nowait(dict(message))

        answering = asyncio.ensure_future(self._app(dict(scope), receive, send))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            ended = False
            while not ended:
                messages = [await sent.get()]
                while not sent.empty():
                    messages.append(sent.get_nowait())
                ended = messages[-1] is None
                if found := [message for message in messages if message is not None]:
                    yield found
            answering.result()
        finally:
            gone.set()  # the front cancels what the engine still does
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([answering], timeout=5)
            answering.cancel()

    async def check_health(self) -> None:
        """Ray asks every few seconds.

        Raises:
            RuntimeError: Ray shall replace this group.
        """
        reason = await asyncio.to_thread(self._client.unhealthy_reason)
        now_s = time.monotonic()
        if reason is None:
            self._ready_s = now_s
        elif self._client.failure is not None or now_s - self._ready_s > self._unready_timeout_s:
            raise RuntimeError(reason)

    def __del__(self) -> None:
        """Ray calls it when nothing is answered any more, or the time to drain is over."""
        if hasattr(self, "_client"):
            self._client.close()


class Gateway:
    """Forwards requests to groups. One whose group dies before its answer has begun is given to another.

    Args:
        group: the groups.
        max_request_bytes: of a body.
    """

    def __init__(self, group: DeploymentHandle, max_request_bytes: int) -> None:
        self._group = group.options(stream=True, method_name="answer")
        self._max_request_bytes = max_request_bytes

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > self._max_request_bytes:
                    return _error(413, f"a request may have {self._max_request_bytes} bytes")
        except ClientDisconnect:
            return _error(499, "the client has gone")
        scope = _plain(request)
        for attempt in range(1, _ATTEMPTS + 1):
            messages = self._group.remote(scope, bytes(body))
            try:
                first = await anext(messages)
            except ray.exceptions.RayActorError as e:
                logger.warning("attempt %d: the group died before its answer began: %s", attempt, type(e).__name__)
                continue
            except BaseException:
                messages.cancel()
                raise
            begin = first.pop(0)
            response = StreamingResponse(_bodies(first, messages, begin), begin["status"])
            response.raw_headers = list(begin["headers"])
            return response
        return _error(503, f"{_ATTEMPTS} groups died while they had this request")


async def _bodies(first: list[dict[str, Any]], messages: Any, begin: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """The answer's bytes; when the group dies its last words are an error in the form of the stream."""
    whole = False
    try:
        while True:
            for message in first:
                yield message.get("body", b"")
            first = await anext(messages)
    except StopAsyncIteration:
        whole = True
    except ray.exceptions.RayActorError:
        whole = True
        headers = {name.lower(): value for name, value in begin["headers"]}
        if b"content-length" in headers:
            raise
        said = b'{"error": {"message": "the group of ranks that gave this answer died", "code": 503, '
        if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            yield b"data: " + said + b'"type": "server_error", "param": null}}\n\n'
        else:
            yield said + b'"field": null}, "finish_reason": "error"}\n'
    finally:
        if not whole:  # the client has gone
            messages.cancel()


def _plain(request: Request) -> dict[str, Any]:
    """Of the scope, what the front reads, in values that can be sent."""
    names = ("type", "method", "path", "raw_path", "query_string", "http_version", "scheme", "client", "server")
    scope = {name: request.scope.get(name) for name in names}
    return {**scope, "asgi": {"version": "3.0"}, "root_path": "", "headers": list(request.scope["headers"])}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "server_error", "param": None, "code": status}}, status)


def settings(args: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Ray's settings, and the options of `tpserve serve`, out of one set of arguments; texts are read as YAML.

    Raises:
        ConfigError: names the one at fault.
    """
    read = {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in args.items()}
    if "checkpoint" not in read:
        raise ConfigError("checkpoint=… must name what is to be served")
    own = {field.name for field in dataclasses.fields(Settings)}
    options = {name: value for name, value in read.items() if name not in own}
    for name in ("host", "port", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        if name in options:
            raise ConfigError(f"{name} is Ray's: it holds the socket")
    return Settings(**{name: value for name, value in read.items() if name in own}), options


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application, for `serve run` and Ray's configuration files.

    Raises:
        ConfigError: it cannot be served so.
    """
    asked, options = settings(args)
    config = FrontConfig.from_options(asked.checkpoint, asked.tp, options)
    gpus = asked.gpus if asked.gpus is not None else 0 if options.get("device") == "cpu" else asked.tp
    needs = {"CPU": asked.cpus} | ({"GPU": gpus} if gpus else {})
    group = serve.deployment(Group).options(
        name="Group",
        ray_actor_options={"num_cpus": asked.cpus, "num_gpus": gpus},
        placement_group_bundles=[needs],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=config.max_connections,
        autoscaling_config={
            "min_replicas": asked.min_replicas,
            "max_replicas": max(asked.min_replicas, asked.max_replicas),
            "target_ongoing_requests": asked.target_ongoing_requests,
        },
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=max(config.drain_timeout_s, 1.0),
    )
    gateway = serve.deployment(Gateway).options(
        name="Gateway",
        num_replicas=asked.gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=config.max_connections * max(asked.min_replicas, asked.max_replicas),
        graceful_shutdown_timeout_s=max(config.drain_timeout_s, 1.0),
    )
    groups = group.bind(asked.checkpoint, asked.tp, options, asked.unready_timeout_s)
    return gateway.bind(groups, config.max_request_bytes)


def main(arguments: list[str]) -> None:
    """Serves until SIGTERM or SIGINT, on this machine alone unless RAY_ADDRESS names a cluster.

    Args:
        arguments: `name=value`; host and port are the proxy's, num_cpus is what this machine counts for.
    """
    args: dict[str, Any] = dict(argument.split("=", 1) for argument in arguments)
    host, port = args.pop("host", "127.0.0.1"), int(args.pop("port", "8000"))
    num_cpus = args.pop("num_cpus", None)
    application = app(args)
    stopped: list[int] = []
    # A Ray of our own need not be reached from elsewhere. It has been seen to take the machine's address all the same:
    # Ray's own ports have no keys, so a firewall must keep strangers away from them.
    own = {} if "RAY_ADDRESS" in os.environ else {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
    ray.init(num_cpus=None if num_cpus is None else int(num_cpus), **own)
    for number in (signal.SIGTERM, signal.SIGINT):  # here: Ray has handlers of its own by now
        signal.signal(number, lambda number, _: stopped.append(number))
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name="tpserve", route_prefix="/")
        print(f"serving {args['checkpoint']} at http://{host}:{port}", flush=True)  # noqa: T201
        while not stopped:
            time.sleep(0.1)
        # Before `shutdown`, which ends the proxy with everything that goes through it.
        serve.delete("tpserve")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
