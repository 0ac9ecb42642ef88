"""Serving, as users see it: `tpserve bench serve`, against any server of OpenAI's protocol. Free of torch.

Requests come by a Poisson process or as in a real trace, at each of several rates; nobody waits for the answers before.
`serve_metrics` defines the figures. With `--against`, ours and a peer are measured in turn, pair by pair, the order
changing from pair to pair, and the ratios are medians over the pairs: what else the machine did hits both.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpserve.bench.record import RESULTS, markdown, write_json
from tpserve.bench.serve_arrivals import Arrival, at_rate, poisson, read_trace
from tpserve.bench.serve_metrics import parse_objectives
from tpserve.bench.serve_run import Asking, load_texts, run
from tpserve.bench.serve_server import running
from tpserve.engine.errors import ConfigError

_RATIOS = (
    ("output tokens/s", "output_tokens_per_s", ""),
    ("TTFT p50", "ttft_ms", "p50"),
    ("TTFT p99", "ttft_ms", "p99"),
    ("ITL p50", "itl_ms", "p50"),
    ("E2E p50", "e2e_ms", "p50"),
    ("goodput", "goodput", "requests_per_s"),
)


def main(
    url: str = "http://127.0.0.1:8080",
    start: str = "",
    against: str = "",
    pairs: int = 3,
    rate: Any = math.inf,
    requests: int = 200,
    input_len: int = 128,
    output_len: int = 64,
    spread: float = 0.0,
    trace: str = "",
    shrink_prompts: float = 1.0,
    shrink_outputs: float = 1.0,
    max_seq_len: int = 4096,
    goodput: str = "",
    tokenizer: str = "",
    vocab_size: int = 256,
    endpoint: str = "completions",
    model: str = "",
    fields: Any = None,
    api_key: str = "",
    max_concurrency: int = 0,
    timeout_s: float = 600.0,
    warmup: int = 2,
    seed: int = 0,
    out: str = "",
    plot: str = "",
) -> None:
    """Measures a server by real or random arrivals: TTFT, inter-token and end-to-end latency, goodput, tokens/s.

    Args:
        url: of a running server, without /v1.
        start: or a command that starts one; {port} stands for where it is to listen.
        against: a peer, as a command or a URL: measured in turn with ours, with the ratios.
        pairs: of ours and the peer's runs.
        rate: requests a second, or several with commas; inf: all at once. With a trace also 0: as it was.
        requests: so many at each rate.
        input_len, output_len: tokens.
        spread: lengths are uniform within this share of theirs.
        trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens: arrivals and lengths are its.
        shrink_prompts, shrink_outputs: a trace's lengths are divided by them.
        max_seq_len: a trace's longer requests are cut to it.
        goodput: objectives in milliseconds, such as ttft:500 itl:50 (also tpot, e2e).
        tokenizer: the model's (a file or its folder): prompts are text then, of exactly these lengths.
        vocab_size: without one, random token ids below it are sent.
        endpoint: completions or chat.
        model: as the server calls it; default: the first that it lists.
        fields: further ones of each request, as a JSON object.
        api_key: default: the environment's OPENAI_API_KEY.
        max_concurrency: at most so many requests at once.
        timeout_s: of one request.
        warmup: requests before.
        seed: of arrivals and lengths. What prompts say is new each time, so that no prefix cache knows it.
        out: the JSON file; default: bench/results/serve.json of a clone, else tpserve-bench-serve.json here.
        plot: throughput against latency: PATH.png and PATH.svg.
    """
    api_key = api_key or os.environ.get("OPENAI_API_KEY", "")
    if not start and "://" not in url:
        raise ConfigError(f"{url!r} is no URL such as http://127.0.0.1:8080")
    asking = Asking(
        endpoint=endpoint, model=model, texts=load_texts(tokenizer) if tokenizer else None, vocab_size=vocab_size,
        fields=_fields(fields), api_key=api_key, max_concurrency=max_concurrency, timeout_s=timeout_s, warmup=warmup,
    )  # fmt: skip
    try:
        objectives = parse_objectives(goodput)
        schedules = [
            (name, arrivals)
            for name, arrivals in _schedules(
                _numbers(rate), requests, (input_len, output_len, spread), trace, (shrink_prompts, shrink_outputs),
                max_seq_len, seed,
            )
        ]  # fmt: skip
    except (OSError, ValueError, LookupError) as e:
        raise ConfigError(str(e)) from None
    servers = {"ours": start or url} | ({"peer": against} if against else {})
    rows: list[dict[str, Any]] = []
    for pair in range(pairs if against else 1):
        for who in sorted(servers, reverse=pair % 2 == 1):
            with running(servers[who], api_key) as place:
                for name, arrivals in schedules:
                    figures = run(place, asking, arrivals, objectives, f"{who}, rate {name}")
                    rows.append({"who": who, "pair": pair, "rate": name, **figures})
    figures = {
        "servers": servers, "requests": requests, "input_len": input_len, "output_len": output_len, "spread": spread,
        "trace": Path(trace).name, "shrink_prompts": shrink_prompts, "shrink_outputs": shrink_outputs,
        "endpoint": endpoint, "prompts": "text" if tokenizer else "token ids", "max_concurrency": max_concurrency,
        "seed": seed, "rows": rows,
    }  # fmt: skip
    if against:
        figures["ratios"] = ratios(rows)
    print(table(rows))
    if against:
        print(f"\nours ÷ peer, medians over {pairs} pairs:\n\n{ratio_table(figures['ratios'])}")
    path = Path(out) if out else (RESULTS / "serve.json" if RESULTS.is_dir() else Path("tpserve-bench-serve.json"))
    write_json(path, "tpserve " + " ".join(_without_keys(sys.argv[1:])), figures)
    print(f"\n{path}")
    if plot:
        from tpserve.bench.plot import throughput_against_latency

        for made in throughput_against_latency(rows, Path(plot)):
            print(made)


def _fields(fields: Any) -> dict[str, Any]:
    if isinstance(fields, str):  # fire reads what looks like a dict itself
        try:
            fields = json.loads(fields)
        except ValueError as e:
            raise ConfigError(f"fields: {e}") from None
    if not isinstance(fields, dict | None):
        raise ConfigError(f"fields must be a JSON object, got {fields!r}")
    return fields or {}


def _numbers(value: Any) -> list[float]:
    """Of "1,2,inf", and of what fire makes of it."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    found = [float(part) for part in parts]
    if not found or any(math.isnan(rate) or rate < 0 for rate in found):
        raise ValueError(f"rate must be requests a second, got {value!r}")
    return found


def _schedules(
    rates: list[float],
    requests: int,
    lengths: tuple[int, int, float],
    trace: str,
    shrink: tuple[float, float],
    max_seq_len: int,
    seed: int,
) -> Iterator[tuple[str, list[Arrival]]]:
    if requests < 1 or min(lengths[:2]) < 1 or not 0 <= lengths[2] <= 1:
        raise ValueError("requests, input_len and output_len must be positive, spread between 0 and 1")
    for rate in rates:
        if trace:
            real = read_trace(Path(trace), requests, *shrink, max_seq_len)
            yield ("as it was", real) if rate == 0 else (f"{rate:g}", at_rate(real, rate))
        elif rate == 0:
            raise ValueError("rate 0, as it was, is of a trace")
        else:
            yield f"{rate:g}", poisson(rate, lengths[0], lengths[1], requests, lengths[2], seed)


def _without_keys(arguments: list[str]) -> list[str]:
    """The command line without what is secret."""
    shown = []
    for i, argument in enumerate(arguments):
        if i and arguments[i - 1] in ("--api_key", "--api-key"):
            shown.append("…")
        elif argument.startswith(("--api_key=", "--api-key=")):
            shown.append(argument.partition("=")[0] + "=…")
        else:
            shown.append(argument)
    return shown


def table(rows: list[dict[str, Any]]) -> str:
    """A row a run, in Markdown; times in ms."""
    goodput = any("goodput" in row for row in rows)
    header = ["", "rate", "req/s", "tokens/s", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99",
              "E2E p50", "p90", "p99", "failed", *(["goodput"] if goodput else [])]  # fmt: skip
    lines = []
    for row in rows:
        points = [row[name].get(p) for name in ("ttft_ms", "itl_ms", "e2e_ms") for p in ("p50", "p90", "p99")]
        line = [row["who"], row["rate"], row["requests_per_s"], row["output_tokens_per_s"], *points, row["failed"]]
        if goodput:
            line.append(f"{row['goodput']['requests_per_s']:.3g} ({row['goodput']['share']:.0%})")
        lines.append(line)
    return markdown(header, lines)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours by the peer's: of each rate and figure, the median over pairs, and each pair's."""
    found = []
    for rate in dict.fromkeys(row["rate"] for row in rows):
        for label, name, point in _RATIOS:
            sides: dict[str, list[float]] = {"ours": [], "peer": []}
            for row in rows:
                value = row.get(name) if not point else row.get(name, {}).get(point)
                if row["rate"] == rate and value:
                    sides[row["who"]].append(value)
            if sides["ours"] and len(sides["ours"]) == len(sides["peer"]):
                each = [ours / peer for ours, peer in zip(sides["ours"], sides["peer"], strict=True)]
                found.append(
                    {"rate": rate, "figure": label, "ours": statistics.median(sides["ours"]),
                     "peer": statistics.median(sides["peer"]), "ratio": round(statistics.median(each), 4),
                     "ratios": [round(ratio, 4) for ratio in each]}
                )  # fmt: skip
    return found


def ratio_table(found: list[dict[str, Any]]) -> str:
    """In Markdown."""
    rows = [[one["figure"], one["rate"], one["ours"], one["peer"], f"{one['ratio']:.3f}",
             f"{min(one['ratios']):.3f} to {max(one['ratios']):.3f}"] for one in found]  # fmt: skip
    return markdown(["", "rate", "ours", "peer", "ratio", "of pairs"], rows)
