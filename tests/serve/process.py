"""`tpserve serve` as users start it: a process on a free loopback port, stopped by its pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tpserve.engine.process import descendants, is_running

PREDICT = "/predictions/tiny"
LONG = {"prompt": "once upon a time", "max_new_tokens": 150, "ignore_eos": True}


class Served:
    """One running `tpserve serve`.

    Args:
        checkpoint: what to serve.
        log: where its stderr goes.
        options: of the command line, "--name", "value", ….
        env: over this process's environment.
    """

    def __init__(self, checkpoint: Path, log: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "tpserve.cli.main", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
        self.log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        self.port = 0
        self.timeout_s = 30.0  # of a request
        self.pids: list[int] = [self.process.pid]

    def wait_until_ready(self, timeout_s: float = 60.0) -> str:
        """Returns the line that it prints when it can make a token."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(timeout_s), self.log.read_text()
        line = self.process.stdout.readline().decode()
        assert line, self.log.read_text()
        self.port = int(line.rpartition(":")[2])
        self.pids += descendants(self.process.pid)
        return line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code; then nothing of it may be running."""
        code = self.process.wait(timeout_s)
        deadline_s = time.monotonic() + 5
        while left := [pid for pid in self.pids if is_running(pid)]:
            assert time.monotonic() < deadline_s, f"outlived it: {left}"
            time.sleep(0.02)
        return code

    def close(self) -> None:
        """Ends it whatever has happened."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @contextlib.contextmanager
    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Sends one request; yields the response when its headers are there."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout_s)
        ) as connection:
            encoded = None if body is None else json.dumps(body).encode()
            connection.request(method, path, encoded, {"Content-Type": "application/json", **(headers or {})})
            with connection.getresponse() as response:
                yield response

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a whole reply."""
        with self.request(method, path, body, headers) as response:
            return response.status, response.read()

    def blocks_in_use(self, headers: Mapping[str, str] | None = None) -> list[int]:
        """KV blocks in use on every rank."""
        status, body = self.ask("GET", "/status", headers=headers)
        assert status == 200, body
        return [rank["num_blocks_in_use"] for rank in json.loads(body)["ranks"]]
