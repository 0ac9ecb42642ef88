"""Steps as pictures: the ranks' spans in the form that Perfetto and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tpserve.engine.protocol import RankTrace

_NS_PER_US = 1000


def chrome_trace(traces: Iterable[RankTrace]) -> dict[str, Any]:
    """A trace in Chrome's JSON format: a process a rank, a thread a track, times in µs from the first span on."""
    traces = sorted(traces, key=lambda trace: trace.rank)
    spans = [span for trace in traces for span in trace.spans]
    start_ns = min((span.start_ns for span in spans), default=0)
    events = [_named("process_name", trace.rank, 0, f"rank {trace.rank}") for trace in traces]
    threads: dict[tuple[int, str], int] = {}
    for span in spans:
        key = (span.rank, span.track)
        if key not in threads:
            threads[key] = len(threads)
            events.append(_named("thread_name", span.rank, threads[key], span.track))
        events.append(
            {
                "name": span.name,
                "ph": "X",
                "ts": (span.start_ns - start_ns) / _NS_PER_US,
                "dur": span.duration_ns / _NS_PER_US,
                "pid": span.rank,
                "tid": threads[key],
                "args": span.about,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
