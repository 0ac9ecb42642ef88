"""Figures of long runs, as Markdown and as a file of `bench/results/`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.data import ROOT


def quantile(values: Iterable[float], q: float) -> float:
    """The nearest value at or above; of none, NaN."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def write(name: str, module: str, figures: dict[str, Any]) -> Path:
    """Writes `bench/results/NAME.json`: command, commit, machine, figures."""
    git = subprocess.run(["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False)
    command = f"python -m {module} {' '.join(sys.argv[1:])}".rstrip()
    path = ROOT / "bench" / "results" / f"{name}.json"
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    result = {"command": command, "commit": git.stdout.strip() or "unknown", "machine": machine, "figures": figures}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
