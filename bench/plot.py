"""Throughput against latency, as PNG and SVG: `pip install 'tpserve[plot]'` brings matplotlib."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tpserve.engine.errors import ConfigError

_PANELS = (("ttft_ms", "time to first token, ms"), ("itl_ms", "inter-token latency, ms"), ("e2e_ms", "end to end, ms"))
_POINTS = (("p50", "-", "o"), ("p99", "--", "^"))


def throughput_against_latency(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """Three panels: each latency's median and 99th percentile at the tokens/s that each rate gave.

    Args:
        rows: of `tpserve bench serve`; several of one server and rate (pairs) are drawn as their median.
        path: where; its ending is replaced by .png and .svg.

    Returns:
        Both files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots want matplotlib: pip install 'tpserve[plot]'") from None
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_PANELS))
    for panel, (name, label) in zip(axes, _PANELS, strict=True):
        for number, who in enumerate(dict.fromkeys(row["who"] for row in rows)):
            for point, line, marker in _POINTS:
                xs, ys = curve(rows, who, name, point)
                panel.plot(xs, ys, line, marker=marker, color=f"C{number}", label=f"{who} {point}")
        panel.set_xlabel("output tokens/s")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [path.with_suffix(ending) for ending in (".png", ".svg")]
    for file in made:
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    return made


def curve(rows: list[dict[str, Any]], who: str, name: str, point: str) -> tuple[list[float], list[float]]:
    """Tokens/s and latency at each rate, by throughput; medians over runs."""
    of_rate: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["who"] == who and row[name]:
            of_rate.setdefault(row["rate"], []).append(row)
    points = sorted(
        (statistics.median(row["output_tokens_per_s"] for row in runs), statistics.median(r[name][point] for r in runs))
        for runs in of_rate.values()
    )
    return [x for x, _ in points], [y for _, y in points]
