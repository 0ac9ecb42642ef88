"""A real TorchServe on free loopback ports, stopped by pid, with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tpserve.handler.server_process import TorchServeProcess

# Of a Java that lives for a minute: compiling what it runs often, on all cores, takes more time than it saves.
SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


class Answer:
    """A whole HTTP reply."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON objects of an NDJSON reply."""
        assert self.body.endswith(b"\n"), self.body
        return [json.loads(line) for line in self.body.splitlines()]


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs; it may end while it is looked at."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Server:
    """One TorchServe with one model store.

    Args:
        store: the model store.
        models: as `torchserve --models` wants them; requests go to the first unless they name another.

    Attributes:
        log: what it printed, backends included.
    """

    def __init__(self, store: Path, models: list[str]) -> None:
        self.process = TorchServeProcess(store, models, disable_system_metrics="true", vmargs=SHORT_LIVED)
        self.log = self.process.log

    def wait_until_ready(self) -> None:
        """Returns when a token can be made."""
        self.process.wait_until_ready(timeout_s=120)

    def processes(self) -> list[psutil.Process]:
        """TorchServe and everything below it."""
        found = []
        for pid in self.process.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def stop(self) -> list[int]:
        """Ends the server; returns the processes that outlived it, by psutil's account too."""
        before = self.processes()
        left = self.process.stop()
        _, alive = psutil.wait_procs(before, timeout=1)
        return left + [process.pid for process in alive if lives(process)]

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        path: str = "",
        body: bytes | None = None,
        content_type: str | None = None,
        model: str | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request; yields the response as soon as its headers are there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=60)
        try:
            url = f"/predictions/{model or self.process.models[0]}" + (f"/{path}" if path else "")
            # A body that is too large is answered before it is read to its end.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, url, body, {"Content-Type": content_type} if content_type else {})
            yield connection.getresponse()
        finally:
            connection.close()

    def get(self, path: str, model: str | None = None) -> Answer:
        with self.request("GET", path, model=model) as response:
            return _read(response)

    def post(self, body: Any, content_type: str | None = "application/json", model: str | None = None) -> Answer:
        """Posts bytes, or anything else as JSON; reads the whole reply."""
        with self.request("POST", "", encoded(body), content_type, model) as response:
            return _read(response)

    def blocks_in_use(self, model: str | None = None) -> list[int]:
        """KV blocks in use on every rank."""
        return [rank["num_blocks_in_use"] for rank in self.get("1.0/status", model).json["ranks"]]


def encoded(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def _read(response: http.client.HTTPResponse) -> Answer:
    return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
