"""A rank group that does what a test tells it to, and what a client hears of it: no processes."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import Event, Failed, Ready, Reply, RequestOutput
from tpserve.engine.sampling_params import SamplingParams
from tpserve.model.args import ModelArgs
from tpserve.model.checkpoint import CheckpointInfo

Make = Callable[..., EngineClient]
READY = Ready(2, 8, 16, 64, "cpu")


class FakeGroup:
    """Remembers what it was sent; `say` is rank 0's word."""

    all: list[FakeGroup]

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.events: list[Event] = []
        self.pids, self.rank_pids = [1, 2], [2]
        self.exit_status: int | None = None
        self.has_gone = self.killed = self.is_stopped = False
        self._replies: queue.Queue[Reply] = queue.Queue()
        FakeGroup.all.append(self)

    num_devices = 8  # of the machine
    silent = False  # it never becomes ready
    checkpoint = ""  # what it says it has loaded

    def go(self) -> None:
        self.has_gone = True
        size = self.config.tensor_parallel_size
        if FakeGroup.silent:
            return
        if size > FakeGroup.num_devices:
            self.say(Failed("too few", FakeGroup.num_devices))
        else:
            self.say(msgspec.structs.replace(READY, tensor_parallel_size=size, checkpoint=self.checkpoint))

    @property
    def death(self) -> str | None:
        return None if self.exit_status is None else f"status {self.exit_status}"

    def say(self, *replies: Reply) -> None:
        for reply in replies:
            self._replies.put(reply)

    def send(self, *events: Event) -> None:
        self.events += events

    def receive(self, timeout_s: float) -> list[Reply]:
        try:
            return [self._replies.get(timeout=timeout_s) if timeout_s else self._replies.get_nowait()]
        except queue.Empty:
            return []

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.killed = True


class Heard:
    """One request's outputs."""

    def __init__(self, client: EngineClient, request_id: str, urgency: dict[str, Any] | None = None, **params: Any):
        self.outputs: list[RequestOutput] = []
        self.changed = threading.Condition()
        client.submit(request_id, [1, 2], SamplingParams(**params), self._take, **(urgency or {}))

    def _take(self, output: RequestOutput) -> None:
        with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()

    def wait(self, n: int) -> list[RequestOutput]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.outputs) >= n, 5), self.outputs
            return self.outputs


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def out(request_id: str, ids: list[int], finish: str | None = None, index: int = 0) -> RequestOutput:
    return RequestOutput(request_id, ids, finish_reason=finish, index=index)


@contextlib.contextmanager
def fake_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes started clients of fake groups; all are closed at the end."""
    FakeGroup.all = []
    monkeypatch.setattr("tpserve.engine.standby.RankGroup", FakeGroup)
    monkeypatch.setattr(FakeGroup, "num_devices", 8)
    CheckpointInfo(ModelArgs(32, 2, 4, 2, 90, 88), "float32").write(tmp_path)
    with contextlib.ExitStack() as stack:

        def client(**options: Any) -> EngineClient:
            given = {"tensor_parallel_size": 2, "standby": False} | options
            made = EngineClient(EngineConfig(checkpoint_dir=str(tmp_path), **given))
            made.start()
            stack.callback(made.close)
            return made

        yield client


def counts(client: EngineClient) -> dict[str, float]:
    """The client's metrics by their names."""
    lines = [line for line in client.metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name.removeprefix("tpserve:"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
