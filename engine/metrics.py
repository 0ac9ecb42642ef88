"""What Prometheus is told about the engine, under vLLM's names.

Observing happens in the thread that hands out tokens, so it is a bisection and two additions; prometheus_client's own
histograms take four times as long. It only writes what was counted here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tpserve.engine.protocol import Heartbeat

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                  40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
_INTER_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
                  5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
_REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
              480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_QUEUE_S = (0.001, 0.01, 0.1, *_REQUEST_S[1:])
# Totals of a group's life; with the next group they begin at 0 again.
_GROUP_TOTALS = (
    "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "num_draft_tokens", "num_accepted_tokens",
)  # fmt: skip
FINISHED_REASONS = ("stop", "length", "cancelled", "timeout", "error")


class Histogram:
    """Counts of observations by size.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """As Prometheus wants it: each bucket with all smaller ones."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), list(self._counts), strict=True):
            total += count
            buckets.append((bound, float(total)))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class EngineMetrics(Collector):
    """One client's counts. Written by its thread, read by any.

    Attributes:
        time_to_first_token, inter_token_latency, request_latency, queue_time: in seconds.
        prompt_tokens, generation_tokens: of requests whose first token has come; made.
        restarts: relaunches of the rank group.
        condemned: requests that ended because groups died of them.
        recovery_s, recovery_to_token_s: of the last recovery: from noticing a death until a group was ready, and until
            the next token of a request that was in flight.
        tensor_parallel_size: ranks of the present group, or of the last one.
    """

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token_latency = Histogram(_INTER_TOKEN_S)
        self.request_latency = Histogram(_REQUEST_S)
        self.queue_time = Histogram(_QUEUE_S)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.restarts = self.condemned = 0
        self.recovery_s = self.recovery_to_token_s = 0.0
        self.tensor_parallel_size = 0
        self._finished = dict.fromkeys(FINISHED_REASONS, 0)
        self._heartbeat: Heartbeat | None = None
        self._num_blocks = 0
        self._before = dict.fromkeys(_GROUP_TOTALS, 0)  # of groups that have ended
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def request_ended(self, finish_reason: str, latency_s: float | None = None) -> None:
        """Counts a request whose last answer ended so; `latency_s` when it ended by itself."""
        self._finished[finish_reason] = self._finished.get(finish_reason, 0) + 1
        if latency_s is not None and finish_reason in ("stop", "length"):
            self.request_latency.observe(latency_s)

    def heard(self, heartbeat: Heartbeat, num_blocks: int) -> None:
        """Takes what the present group says of itself; it has so many KV blocks."""
        self._heartbeat, self._num_blocks = heartbeat, num_blocks

    def group_ended(self) -> None:
        """The next heartbeat will be another group's."""
        self._before = self._totals()
        self._heartbeat = None

    def text(self) -> bytes:
        """Prometheus' text format, of `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        beat, totals = self._heartbeat, self._totals()
        usage = beat.num_blocks_in_use / self._num_blocks if beat is not None and self._num_blocks else 0.0
        yield _gauge("num_requests_running", "Sequences that tokens are made for.", beat.num_running if beat else 0)
        yield _gauge("num_requests_waiting", "Sequences that wait for KV blocks.", beat.num_waiting if beat else 0)
        yield _gauge("kv_cache_usage_perc", "KV blocks with an owner; 1 is all.", usage)
        yield _counter("prefix_cache_queries", "Prompt tokens looked for in the cache.", totals["prefix_cache_queries"])
        yield _counter("prefix_cache_hits", "Prompt tokens found in the cache.", totals["prefix_cache_hits"])
        yield self.time_to_first_token.family("tpserve:time_to_first_token_seconds", "From submission.")
        yield self.inter_token_latency.family("tpserve:inter_token_latency_seconds", "Between tokens of an answer.")
        yield self.request_latency.family("tpserve:e2e_request_latency_seconds", "From submission to the last token.")
        yield self.queue_time.family("tpserve:request_queue_time_seconds", "From submission to the first step.")
        yield _counter("prompt_tokens", "Prompt tokens of requests that got a token.", self.prompt_tokens)
        yield _counter("generation_tokens", "Tokens made.", self.generation_tokens)
        finished = CounterMetricFamily("tpserve:request_success", "Requests that ended.", labels=["finished_reason"])
        for reason, count in list(self._finished.items()):
            finished.add_metric([reason], count)
        yield finished
        yield _counter("num_preemptions", "Sequences that gave their KV blocks back.", totals["num_preemptions"])
        yield _counter("spec_decode_num_draft_tokens", "Tokens guessed.", totals["num_draft_tokens"])
        yield _counter("spec_decode_num_accepted_tokens", "Guesses that were right.", totals["num_accepted_tokens"])
        yield _counter("engine_restarts", "Relaunches of the rank group.", self.restarts)
        yield _counter("requests_condemned", "Requests that rank groups died of.", self.condemned)
        yield _gauge("engine_recovery_seconds", "Last: from a group's end to ready.", self.recovery_s)
        yield _gauge("engine_recovery_to_token_seconds", "Likewise, to the next token.", self.recovery_to_token_s)
        yield _gauge("tensor_parallel_size", "Ranks of the group.", self.tensor_parallel_size)

    def _totals(self) -> dict[str, int]:
        beat = self._heartbeat
        return {name: before + (getattr(beat, name) if beat else 0) for name, before in self._before.items()}


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tpserve:{name}", documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"tpserve:{name}", documentation, value=value)
