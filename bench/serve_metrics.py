"""Figures of a run: latencies by percentile, tokens a second, goodput under a service-level objective.

Definitions (those of `vllm bench serve` where it has one):
- TTFT: from when the request was due to the first chunk with tokens. A request that the load generator sent late is not
  forgiven; `late_ms` says how late they were, and `ttft_sent_ms` counts from the sending instead, as others do.
- ITL: times between chunks with tokens, of all requests together. A chunk may hold several tokens.
- TPOT: of one request, from its first to its last chunk, by its tokens less one.
- E2E: from when it was due to the last of the answer.
- Goodput: requests a second that met every objective (Zhong et al., DistServe, OSDI 2024, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpserve.bench.serve_events import Answer

OBJECTIVES = ("ttft", "itl", "tpot", "e2e")


def parse_objectives(text: str) -> dict[str, float]:
    """ "ttft:500 itl:50" as milliseconds by name.

    Args:
        text: pairs with blanks or commas between them. "itl" is met when 99% of a request's gaps are within it.

    Raises:
        ValueError: a name is unknown, or a limit is no positive number.
    """
    found = {}
    for pair in text.replace(",", " ").split():
        name, colon, limit = pair.partition(":")
        if name not in OBJECTIVES or not colon:
            raise ValueError(f"{pair!r} is no objective: NAME:MILLISECONDS with one of {', '.join(OBJECTIVES)}")
        try:
            found[name] = float(limit)
        except ValueError:
            raise ValueError(f"{pair!r}: {limit!r} is no number of milliseconds") from None
        if not found[name] > 0:
            raise ValueError(f"{pair!r}: an objective must be positive")
    return found


def times_ms(answer: Answer) -> dict[str, float]:
    """TTFT, TPOT, E2E and the 99th percentile of the gaps of one good answer; 0 where it has one token."""
    heard = np.array(answer.heard_s)
    gaps = np.diff(heard)
    tokens = answer.output_tokens or len(heard)
    return {
        "ttft": 1e3 * float(heard[0] - answer.due_s),
        "tpot": 1e3 * float(answer.ended_s - heard[0]) / (tokens - 1) if tokens > 1 else 0.0,
        "e2e": 1e3 * (answer.ended_s - answer.due_s),
        "itl": 1e3 * float(np.percentile(gaps, 99)) if len(gaps) else 0.0,
    }


def summarise(answers: Sequence[Answer], started_s: float, objectives: Mapping[str, float]) -> dict[str, Any]:
    """Figures of one run.

    Args:
        answers: of all its requests, failed ones too.
        started_s: of the schedule's beginning; tokens a second count from here to the last end.
        objectives: milliseconds by name; empty: no goodput.
    """
    good = [answer for answer in answers if not answer.error]
    each = [times_ms(answer) for answer in good]
    duration_s = max((answer.ended_s for answer in answers), default=started_s) - started_s
    output_tokens = sum(answer.output_tokens or len(answer.heard_s) for answer in good)
    prompt_tokens = sum(answer.prompt_tokens for answer in good)
    gaps = [1e3 * gap for answer in good for gap in np.diff(np.array(answer.heard_s)).tolist()]
    figures: dict[str, Any] = {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
        "duration_s": round(duration_s, 3),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": round(len(good) / duration_s, 4) if good else 0.0,
        "output_tokens_per_s": round(output_tokens / duration_s, 3) if good else 0.0,
        "total_tokens_per_s": round((prompt_tokens + output_tokens) / duration_s, 3) if good else 0.0,
        "tokens_per_chunk": round(output_tokens / max(1, sum(len(a.heard_s) for a in good)), 3),
        "ttft_ms": _points([one["ttft"] for one in each]),
        "ttft_sent_ms": _points([1e3 * (answer.heard_s[0] - answer.sent_s) for answer in good]),
        "itl_ms": _points(gaps),
        "tpot_ms": _points([one["tpot"] for one, a in zip(each, good, strict=True) if len(a.heard_s) > 1]),
        "e2e_ms": _points([one["e2e"] for one in each]),
        "late_ms": _points([1e3 * (answer.sent_s - answer.due_s) for answer in good]),
        "peak_concurrency": _peak(answers),
    }
    if objectives:
        met = sum(all(one[name] <= limit for name, limit in objectives.items()) for one in each)
        figures["goodput"] = {
            "objectives_ms": dict(objectives),
            "requests_per_s": round(met / duration_s, 4) if duration_s else 0.0,
            "share": round(met / len(answers), 4) if answers else 0.0,
        }
    return figures


def _points(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p99 = np.percentile(np.array(values), (50, 90, 99)).tolist()
    return {"mean": round(float(np.mean(values)), 3), "p50": round(p50, 3), "p90": round(p90, 3), "p99": round(p99, 3)}


def _peak(answers: Sequence[Answer]) -> int:
    """Most requests at once."""
    edges = sorted([(a.sent_s, 1) for a in answers if a.sent_s] + [(a.ended_s, -1) for a in answers if a.sent_s])
    running = np.cumsum([step for _, step in edges])
    return int(running.max()) if len(running) else 0
