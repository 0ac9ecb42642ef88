"""What benchmarks of the engine share: requests that note when their tokens come, percentiles, a model."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import Heartbeat, RequestOutput
from tpserve.engine.sampling_params import SamplingParams

DEMO_MODEL = Path(__file__).resolve().parents[1] / "model_store" / "demo"


class Stream:
    """One request with one answer, and when its tokens came; times are seconds of the monotonic clock.

    Args:
        request_id: unique among those in flight.
        prompt: token ids.
        params: how tokens are chosen.
        on_tokens: called in the client's thread with the stream after each output.

    Attributes:
        arrived_s: when the request was there; latencies count from it, so that a late submission is not forgiven.
        token_ids: so far.
        heard_s: when each of them came.
        num_cached_tokens: prompt tokens that the prefix cache had.
        finish_reason, ended_s: of the last output.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        on_tokens: Callable[[Stream], None] | None = None,
    ) -> None:
        self.request_id, self.prompt, self.params = request_id, prompt, params
        self.arrived_s = 0.0
        self.token_ids: list[int] = []
        self.heard_s: list[float] = []
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.ended_s = math.inf
        self._on_tokens = on_tokens
        self._begun, self._ended = threading.Event(), threading.Event()

    def submit(
        self,
        client: EngineClient,
        arrived_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """Starts the request; it arrived now, or at `arrived_s`."""
        self.arrived_s = time.monotonic() if arrived_s is None else arrived_s
        client.submit(self.request_id, self.prompt, self.params, self._take, timeout_s=timeout_s)
        return self

    @property
    def first_token_s(self) -> float:
        """From arrival to the first token."""
        return self.heard_s[0] - self.arrived_s

    @property
    def end_to_end_s(self) -> float:
        """From arrival to the end."""
        return self.ended_s - self.arrived_s

    def gaps_s(self, after_s: float = 0.0) -> list[float]:
        """The times between tokens, of those that came after `after_s`."""
        heard = np.array([s for s in self.heard_s if s >= after_s])
        return [float(gap) for gap in np.diff(heard)]

    def wait_begun(self, timeout_s: float = 300.0) -> None:
        """Until the first output."""
        if not self._begun.wait(timeout_s):
            raise TimeoutError(f"{self.request_id}: nothing after {timeout_s:g} s")

    def wait(self, timeout_s: float = 300.0) -> list[int]:
        """The tokens, once the request has ended."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"{self.request_id}: no end after {timeout_s:g} s")
        return self.token_ids

    def _take(self, output: RequestOutput) -> None:
        now_s = time.monotonic()
        self.token_ids += output.token_ids
        self.heard_s += [now_s] * len(output.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._on_tokens is not None:
            self._on_tokens(self)
        self._begun.set()
        if output.finish_reason is not None:
            self.finish_reason, self.ended_s = output.finish_reason, now_s
            self._ended.set()


@contextlib.contextmanager
def converted(model: str) -> Iterator[str]:
    """A converted checkpoint folder: `model` itself, or Meta's shards in it, converted for the time of the block."""
    if (Path(model) / "model.json").is_file():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        yield str(convert(Path(model), Path(folder) / "converted", progress=False))


@contextlib.contextmanager
def engine(config: EngineConfig) -> Iterator[EngineClient]:
    """A group that is ready; one thread a rank unless OMP_NUM_THREADS says otherwise, for ranks share the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    client = EngineClient(config)
    try:
        client.start()
        yield client
    finally:
        client.close()


def settled_heartbeat(client: EngineClient, timeout_s: float = 10.0) -> Heartbeat:
    """A heartbeat with the totals of everything up to now: they come once a second."""
    step = client.status().ranks[0].step
    deadline_s = time.monotonic() + timeout_s
    while client.heartbeat is None or client.heartbeat.step < step:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no heartbeat after step {step} within {timeout_s:g} s")
        time.sleep(0.02)
    return client.heartbeat


def percentiles_ms(seconds: Iterable[float], points: tuple[int, ...] = (50, 90, 99)) -> dict[str, float]:
    """By name (p50, …; max for 100), in milliseconds."""
    values = np.percentile(np.array(list(seconds)) * 1e3, points).round(2).tolist()
    return {"max" if point == 100 else f"p{point}": value for point, value in zip(points, values, strict=True)}
