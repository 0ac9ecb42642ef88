"""Tables of `bench.gpu`'s results: one of each machine, and one of all for README. Free of torch."""

from __future__ import annotations

from typing import Any

from tpserve.bench import roofline
from tpserve.bench.engine_runs import MODELS
from tpserve.bench.record import markdown
from tpserve.bench.roofline import H200
from tpserve.model.args import ModelArgs

TEXT = """\
Shapes of Llama 2 and 3.1 (8B), bf16, random weights, greedy; client, scheduler, paged cache and sampler included. "Of
floor": the time to read the weights and the KV once at 4.24 TB/s, by the time that a step took. The peer is vLLM 0.26,
after ours on the same machine; where it is missing it was not measured.

Rooflines (`bench/roofline.py` says what is counted) are by ceilings that the same run measured: the columns
"here". Where they say 4.24 and 790, the result is older, and they are another H200's. Times are medians of runs in
results that have a column of gaps, what the device waits between two steps; in older ones, and of the peer, the
fastest."""
_PEER = "vLLM"

Result = dict[str, Any]
Row = dict[str, Any]


def by_machine(results: dict[str, Result]) -> list[str]:
    """Names of results of whole machines, by number of GPUs, the newest of each number only."""
    newest: dict[int, tuple[str, str]] = {}
    for name, result in results.items():
        rows = result["figures"].get("rows") or [{}]
        if isinstance(rows, list) and {"goals", "kind", "model"} <= set(rows[0]) and not name.startswith("gpu_"):
            gpus = result["figures"]["gpus"]
            newest[gpus] = max(newest.get(gpus, ("", "")), (result.get("date", ""), name))
    return [name for _, (_, name) in sorted(newest.items())]


def table(result: Result) -> str:
    """Every row of a machine."""
    rows = result["figures"]["rows"]
    gaps = ["gap µs (p99)"] if any("gap_us" in row for row in rows) else []
    header = ["", "TTFT ms", f"{_PEER}", "ms a step", f"{_PEER}", "of floor", "tokens/s", f"{_PEER}", *gaps, "goal"]
    lines, roofs = [], []
    for row in rows:
        label = f"{row['model']} TP {row['tp']}, {_what(row)}"
        peer = row.get("peer") or {}
        goal = ", ".join(f"{name} {value:g}{' missed' if name in row['missed'] else ''}"
                         for name, value in row["goals"].items())  # fmt: skip
        if row["kind"] == "lat":
            share = f"{row['floor_ms'] / row['step_ms']:.0%}"
            line = [row["ttft_ms"], peer.get("ttft_ms"), row["step_ms"], peer.get("step_ms"), share,
                    row["tokens_per_s"], peer.get("tokens_per_s")]  # fmt: skip
        elif row["kind"] == "thr":
            line = [None, None, None, None, None, row["tokens_per_s"], peer.get("tokens_per_s")]
        else:
            line = [1e3 * row["start_s"], None, None, None, None, None, None]
        if gaps:
            gap = row.get("gap_us")
            line.append(gap and f"{gap['median']:.0f} ({gap['p99']:.0f})")
        lines.append([label, *line, goal])
        for what, one in _rooflines(row).items():
            roofs.append([f"{label}: {what}", one["gbytes"], one["gflop"] / 1e3, one["tb_per_s"], one["tflop_per_s"],
                          one["floor_ms"], one["ms"], f"{one['share']:.0%}", one["bound"]])  # fmt: skip
    text = markdown(header, lines)
    if roofs:
        head = ["roofline", "GB", "TFLOP", "TB/s here", "TFLOP/s here", "floor ms", "ms", "reached", "bound"]
        text += "\n\n" + markdown(head, roofs)
    return text


def _rooflines(row: Row) -> dict[str, Any]:
    """Those of the result, or by what another H200 was measured at."""
    if "roofline" in row:
        found: dict[str, Any] = row["roofline"]
        return found
    if row["model"] not in MODELS:
        return {}
    return roofline.of_row(row, ModelArgs.from_params(MODELS[row["model"]]), row["tp"], H200, 2)


def summary(results: dict[str, Result]) -> str:
    """README's: of whole machines; then of models by themselves, beside the peer, greedy."""
    alone = [
        result
        for name, result in results.items()
        if name.startswith("gpu_")
        and not result["figures"]["options"]
        and any(row.get("peer") for row in result["figures"]["rows"])
    ]
    tables = [_side_by_side([results[name] for name in by_machine(results)])]
    return "\n\n".join([*tables, _side_by_side(alone)] if alone else tables)


def _side_by_side(results: list[Result]) -> str:
    """A row a figure, a pair of columns each model and number of GPUs."""
    cells: dict[tuple[str, str, int, int], dict[tuple[str, int], Row]] = {}
    columns: dict[tuple[str, int], None] = {}
    for result in results:
        for row in result["figures"]["rows"]:
            column = (row["model"], row["tp"])
            columns[column] = None
            if not row.get("first", True):
                continue  # a start that found kernels on disk
            for figure in _FIGURES[row["kind"]]:
                cells.setdefault((figure, row["kind"], row["batch"], row["in"]), {})[column] = row
    header = [""]
    for model, tp in columns:
        header += [f"{model}, {tp} GPU{'s' if tp > 1 else ''}", _PEER]
    lines = []
    for key in sorted(cells, key=_order):
        line = [_heading(*key, cells[key])]
        for column in columns:
            line += _pair(key[0], cells[key].get(column))
        lines.append(line)
    return markdown(header, lines)


_FIGURES = {"lat": ("step_ms", "ttft_ms"), "thr": ("tokens_per_s",), "start": ("start_s",)}


def _order(key: tuple[str, str, int, int]) -> tuple[int, int, int]:
    return ("step_ms", "ttft_ms", "tokens_per_s", "start_s").index(key[0]), key[2], key[3]


def _what(row: Row) -> str:
    if row["kind"] == "start":
        return f"a start with{'out' if row.get('first', True) else ''} kernels on disk, to the first token"
    return f"{'batch' if row['kind'] == 'lat' else 'requests'} {row['batch']}, {row['in']} in, {row['out']} out"


def _heading(figure: str, kind: str, batch: int, length: int, rows: dict[tuple[str, int], Row]) -> str:
    if figure == "step_ms":
        return f"batch {batch}, {length:,} in: ms a token"
    if figure == "ttft_ms":
        return f"time to first token, {f'{batch} x ' if batch > 1 else ''}{length:,} in, ms"
    if figure == "tokens_per_s":
        out = next(iter(rows.values()))["out"]
        return f"{batch} requests, {length:,} in, {out:,} out: output tokens/s"
    return "a start without kernels on disk, until the first token, s"


def _pair(figure: str, row: Row | None) -> list[str]:
    """Ours and the peer's; the better one is bold, and a step's share of its floor in brackets."""
    if row is None:
        return ["", ""]
    ours, peer = row[figure], (row.get("peer") or {}).get(figure)
    better = peer is None or (ours > peer if figure == "tokens_per_s" else ours < peer)
    text = f"**{_round(ours)}**" if better else _round(ours)
    if figure == "step_ms":
        text += f" ({row['floor_ms'] / ours:.0%})"
    return [text, "" if peer is None else _round(peer) if better else f"**{_round(peer)}**"]


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
