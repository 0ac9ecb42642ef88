"""`docs/benchmarks.md` and README's table of GPUs from `bench/results/*.json`: `python -m tpserve.bench.report`.

Neither is ever edited by hand: a test compares them with what this prints. With `--check` nothing is written, and the
exit status says whether something would be. Free of torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fire

from tpserve.bench import report_gpu
from tpserve.bench.record import RESULTS, markdown
from tpserve.bench.serve import ratio_table
from tpserve.bench.serve import table as serve_table

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- by tpserve.bench.report -->", "<!-- end of tpserve.bench.report -->"
_MOST_LINES = 60  # of a result without a form of its own

Result = dict[str, Any]


def read_results(folder: Path) -> dict[str, Result]:
    """Every result, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def page(results: dict[str, Result]) -> str:
    """`docs/benchmarks.md`."""
    sections = [_HEAD]
    gpus = report_gpu.by_machine(results)
    if gpus:
        sections.append("## The whole engine on GPUs\n\n" + report_gpu.TEXT)
        sections += [_section(name, results[name], "###", report_gpu.table) for name in gpus]
    sections.append("## Everything else, by name")
    sections += [_section(name, results[name], "###", _form(name)) for name in results if name not in gpus]
    return "\n\n".join(sections) + "\n"


_HEAD = """\
# Benchmarks

Written by `python -m tpserve.bench.report` from the files in `bench/results/`, each of which a command has written;
[bench.md](bench.md) says what each measures. Times depend on the machine and on who else is on it: compare only what
stands in one table."""


def _section(name: str, result: Result, level: str, form: Callable[[Result], str]) -> str:
    machine = result.get("machine", {})
    where = ", ".join(
        str(part)
        for part in (
            machine.get("gpus"), machine.get("cpu"), machine.get("cores") and f"{machine['cores']} cores",
            machine.get("torch") and f"torch {machine['torch']}",
        ) if part
    )  # fmt: skip
    when = f", {result['date']}" if "date" in result else ""
    # Where files lay on that machine is nobody's business, nor how the peer was installed.
    command = re.sub(r"(?<=\s)/\S*/", "", result["command"].partition(" --peer ")[0])
    lines = [f"{level} {name}", f"`{command}`", f"At {result['commit']}{when}: {where}.", form(result)]
    return "\n\n".join(lines)


def _form(name: str) -> Callable[[Result], str]:
    for pattern, form in _FORMS:
        if re.fullmatch(pattern, name):
            return form
    return _anything


def _serving(result: Result) -> str:
    figures = result["figures"]
    text = serve_table(figures["rows"])
    return text + (f"\n\nOurs by the peer's:\n\n{ratio_table(figures['ratios'])}" if "ratios" in figures else "")


def _instruments(result: Result) -> str:
    figures = result["figures"]
    how = "at the same time" if figures["together"] else "in turn"
    said = f"The peer is `{figures['instrument']}`, at the same server, {how}: {figures['requests']} requests a run, "
    said += f"{figures['input_len']} tokens in, {figures['output_len']} out, {figures['pairs']} pairs."
    return f"{said}\n\n{ratio_table(figures['ratios'])}"


def _offline(result: Result) -> str:
    figures = result["figures"]
    rows = []
    for row in figures["rows"]:
        for what, one in row["roofline"].items():
            rows.append(
                [f"{row['batch']} x {row['in']} in, {row['out']} out: {what}", one["ms"], one["floor_ms"],
                 f"{one['share']:.0%}", one["bound"], row["tokens_per_s"]]
            )  # fmt: skip
    said = f"`{figures['model']}`, TP {figures['tp']}, {figures['dtype']}, {figures['device']}."
    return f"{said}\n\n{markdown(['', 'ms', 'floor, ms', 'of it', 'bound', 'tokens/s'], rows)}"


def _anything(result: Result) -> str:
    """Lists of like objects as tables, the rest as name and value."""
    single: list[tuple[str, Any]] = []
    tables: list[str] = []
    for name, value in result["figures"].items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            tables.append(_objects(name, value))
        elif isinstance(value, dict) and value and all(isinstance(one, dict) for one in value.values()):
            tables.append(_objects(name, [{name: key, **one} for key, one in value.items()]))
        else:
            single += _flat(name, value)
    left = len(single) - _MOST_LINES
    shown = markdown(["", "value"], [[name, _short(value)] for name, value in single[:_MOST_LINES]]) if single else ""
    more = f"and {left} more figures in the file" if left > 0 else ""
    return "\n\n".join(part for part in (shown, more, *tables) if part)


def _objects(name: str, objects: Iterable[dict[str, Any]]) -> str:
    rows = [dict(_flat("", one)) for one in objects]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_short(row.get(column)) for column in columns] for row in rows]
    return f"{name}:\n\n{markdown(columns, cells)}"


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, one in value.items() for pair in _flat(f"{name} {key}".strip(), one)]
    return [(name.replace("_", " "), value)]


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_short(one)) for one in value[:8]) + (" …" if len(value) > 8 else "")
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value


_FORMS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    (r"serve_instruments(-.*)?", _instruments),
    (r"serve(-.*)?", _serving),
    (r"(latency|throughput)(-.*)?", _offline),
    (r"gpu_.*", report_gpu.table),
)


def between_markers(text: str, table: str) -> str:
    """README with the table between the markers.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README must have {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def made(results_folder: Path = RESULTS) -> dict[Path, str]:
    """What stands in each file."""
    results = read_results(results_folder)
    readme = between_markers(README.read_text(encoding="utf-8"), report_gpu.summary(results))
    return {PAGE: page(results), README: readme}


def main(check: bool = False) -> None:
    """Writes both.

    Args:
        check: only says which would change; exit status 1: one would.
    """
    changed = []
    for path, text in made().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            changed.append(path)
            if not check:
                path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    sys.exit(bool(changed) and check)


if __name__ == "__main__":
    fire.Fire(main)
