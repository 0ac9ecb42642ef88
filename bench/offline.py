"""The whole engine without HTTP: `tpserve bench latency` by batch and length, `tpserve bench throughput` by requests.

`engine_runs` says how it is measured, `roofline` what it could have been. A peer's command measures the same rows in
its own way (`gpu` says which form it writes them in) and takes turns with ours, pair by pair, the order changing from
pair to pair; ratios are medians over the pairs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tpserve.bench import roofline
from tpserve.bench.engine_runs import MODELS, Engine
from tpserve.bench.engine_runs import latency as latency_row
from tpserve.bench.engine_runs import throughput as throughput_row
from tpserve.bench.record import RESULTS, markdown, write_json
from tpserve.engine.errors import ConfigError

_FIGURES = {"lat": ("ttft_ms", "step_ms", "tokens_per_s"), "thr": ("tokens_per_s",)}
Row = dict[str, Any]


def numbers(value: Any, name: str) -> tuple[int, ...]:
    """Of "1,8", and of what fire makes of it.

    Raises:
        ConfigError: they are no positive integers.
    """
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        found = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be numbers with commas between them, got {value!r}") from None
    if not found or min(found) < 1:
        raise ConfigError(f"{name} must be positive, got {value!r}")
    return found


def latency(
    model: str,
    tp: int = 1,
    batch: Any = "1,8",
    input_len: Any = "128,1024",
    output_len: int = 256,
    dtype: str = "",
    device: str = "",
    against: str = "",
    pairs: int = 3,
    out: str = "",
    **options: Any,
) -> None:
    """Measures time to first token and time of a step, by batch and length.

    Args:
        model: a checkpoint of any form, or a shape with random weights: 7B, 13B, 70B, 110M, tiny.
        tp: tensor-parallel size.
        batch, input_len: one or several, with commas: every pair of them.
        output_len: tokens of each answer.
        dtype: of weights and activations; default bfloat16 on GPUs, float32 on CPUs.
        device: cuda or cpu; default: cuda where there is one.
        against: a peer's command; {model}, {tp}, {batches}, {prompts}, {requests} stand for what it is to measure.
        pairs: of ours and the peer's runs.
        out: the JSON file; default: bench/results/latency.json of a clone, else tpserve-bench-latency.json here.
        options: keys of the engine's configuration.
    """
    if output_len < 2:
        raise ConfigError(f"output_len must be at least 2, for a step is to be measured; got {output_len}")
    wanted = [(b, length) for b in numbers(batch, "batch") for length in numbers(input_len, "input_len")]

    def rows(engine: Engine, bar: Any) -> list[Row]:
        return [_told(bar, latency_row(engine, b, length, output_len)) for b, length in wanted]

    asked = {"batches": [b for b, _ in wanted], "prompts": [length for _, length in wanted], "requests": []}
    _measure("latency", rows, len(wanted), asked, model, tp, dtype, device, against, pairs, out, options)


def throughput(
    model: str,
    tp: int = 1,
    requests: Any = "64,256",
    input_len: int = 512,
    output_len: int = 256,
    dtype: str = "",
    device: str = "",
    against: str = "",
    pairs: int = 3,
    out: str = "",
    **options: Any,
) -> None:
    """Measures output tokens a second, by the number of requests that are there at once.

    Args:
        model: a checkpoint of any form, or a shape with random weights: 7B, 13B, 70B, 110M, tiny.
        tp: tensor-parallel size.
        requests: one or several, with commas.
        input_len, output_len: tokens of each.
        dtype: of weights and activations; default bfloat16 on GPUs, float32 on CPUs.
        device: cuda or cpu; default: cuda where there is one.
        against: a peer's command; {model}, {tp}, {batches}, {prompts}, {requests} stand for what it is to measure.
        pairs: of ours and the peer's runs.
        out: the JSON file; default: bench/results/throughput.json of a clone, else tpserve-bench-throughput.json here.
        options: keys of the engine's configuration.
    """
    wanted = numbers(requests, "requests")

    def rows(engine: Engine, bar: Any) -> list[Row]:
        return [_told(bar, throughput_row(engine, n, input_len, output_len)) for n in wanted]

    asked = {"batches": [], "prompts": [input_len], "requests": wanted}
    _measure("throughput", rows, len(wanted), asked, model, tp, dtype, device, against, pairs, out, options)


def _told(bar: Any, row: Row) -> Row:
    bar.update()
    return row


def _measure(
    name: str,
    rows_of: Callable[[Engine, Any], list[Row]],
    num_rows: int,
    asked: dict[str, Any],
    model: str,
    tp: int,
    dtype: str,
    device: str,
    against: str,
    pairs: int,
    out: str,
    options: dict[str, Any],
) -> None:
    if model not in MODELS and not Path(model).exists():
        raise ConfigError(f"model must be a checkpoint or one of {', '.join(MODELS)}, got {model!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    ceilings = roofline.measured(device, dtype, tp)
    runs: list[list[Row]] = []
    theirs: list[list[Row]] = []
    for pair in range(pairs if against else 1):
        sides = ["ours", "peer"] if against else ["ours"]
        for who in reversed(sides) if pair % 2 else sides:
            if who == "peer":
                theirs.append(_peer(against, {"model": model, "tp": tp, **asked}))
                continue
            with tqdm(total=num_rows, desc=f"{name}, pair {pair + 1}" if against else name, leave=False) as bar:
                engine = Engine(model, tp, dtype, device=device, **options)
                try:
                    runs.append(rows_of(engine, bar))
                finally:
                    engine.close()
    rows = [_median(same) for same in zip(*runs, strict=True)]
    itemsize = getattr(torch, dtype).itemsize
    for row in rows:  # ranks on a CPU share its memory and cores: together they are one device
        ranks = tp if device == "cuda" else 1
        row["roofline"] = roofline.of_row(row, engine.args, ranks, ceilings, itemsize, engine.block_bytes)
        if against:
            row["peer"], row["ratios"] = _beside(row, runs, theirs)
    print(_table(rows))
    for row in rows:
        for what, one in row["roofline"].items():
            print(f"{_label(row)}: {roofline.line(what, one)}")
    figures = {
        "model": Path(model).name, "tp": tp, "dtype": dtype, "device": ceilings.device, "threads_a_rank":
        int(os.environ.get("OMP_NUM_THREADS", "0")), "pairs": pairs if against else 0, "against": against,
        "options": options, "rows": rows,
    }  # fmt: skip
    path = Path(out) if out else (RESULTS / f"{name}.json" if RESULTS.is_dir() else Path(f"tpserve-bench-{name}.json"))
    write_json(path, " ".join(["tpserve", *sys.argv[1:]]), figures)
    print(f"\n{path}")


def _median(same: Sequence[Row]) -> Row:
    """One row of several runs of it."""
    found = {name: statistics.median(row[name] for row in same) for name in _FIGURES["lat"]}
    if "fastest" in same[0]:
        found["fastest"] = {name: min(row["fastest"][name] for row in same) for name in same[0]["fastest"]}
    if "gap_us" in same[0]:
        gaps = sorted((row["gap_us"] for row in same if row["gap_us"]), key=lambda gap: gap["median"])
        found["gap_us"] = gaps[len(gaps) // 2] if gaps else None
    return {**same[0], **found}


def _peer(command: str, values: dict[str, Any]) -> list[Row]:
    for name, value in values.items():
        text = str(value) if isinstance(value, str | int) else ",".join(map(str, dict.fromkeys(value)))
        command = command.replace(f"{{{name}}}", text)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, shell=True, env=os.environ | {"OUT": folder}, check=False)
        found = [row for path in sorted(Path(folder).glob("*.json")) for row in json.loads(path.read_text())]
    if done.returncode or not found:
        raise ConfigError(f"the peer ended with status {done.returncode} and wrote {len(found)} rows into $OUT")
    names = ("kind", "batch", "in", "out", *_FIGURES["lat"])
    return [dict(zip(names, row, strict=False)) for row in found]


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row["batch"], row["in"], row["out"]


def _beside(row: Row, runs: list[list[Row]], theirs: list[list[Row]]) -> tuple[Row, dict[str, Any]]:
    """The peer's medians, and ours by the peer's of each figure: the median over pairs, and each pair's."""
    ours = [one for run in runs for one in run if _key(one) == _key(row)]
    peer = [one for run in theirs for one in run if _key(one) == _key(row)]
    if len(ours) != len(peer):
        raise ConfigError(f"the peer measured {len(peer)} of {len(ours)} times: {_label(row)}")
    found = {}
    for name in _FIGURES[row["kind"]]:
        each = [mine[name] / its[name] for mine, its in zip(ours, peer, strict=True)]
        found[name] = {"ratio": round(statistics.median(each), 4), "ratios": [round(ratio, 4) for ratio in each]}
    return _median(peer), found


def _label(row: Row) -> str:
    return f"{row['batch']} x {row['in']} in, {row['out']} out"


def _table(rows: list[Row]) -> str:
    names = {"ttft_ms": "TTFT ms", "step_ms": "ms a step", "tokens_per_s": "tokens/s"}
    shown = _FIGURES[rows[0]["kind"]]
    header = ["", *(names[name] for name in shown), "of roofline", "gap, µs", "p99"]
    if "peer" in rows[0]:
        header += [f"{head} {names[name]}" for name in shown for head in ("peer", "ratio")]
    lines = []
    for row in rows:
        last = list(row["roofline"].values())[-1]
        line = [_label(row), *(row[name] for name in shown), f"{last['share']:.0%} ({last['bound']})"]
        line += [row["gap_us"] and f"{row['gap_us'][name]:.0f}" for name in ("median", "p99")]
        if "peer" in row:
            line += [x for name in shown for x in (row["peer"][name], f"{row['ratios'][name]['ratio']:.3f}")]
        lines.append(line)
    return markdown(header, lines)
