"""The pages that are made of results are those that are committed, and what they say is in the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpserve.bench import report, report_gpu
from tpserve.bench.record import RESULTS, markdown, write_json


def test_the_committed_pages_are_the_scripts() -> None:
    for path, text in report.made().items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m tpserve.bench.report"


def test_every_result_is_on_the_page() -> None:
    results = report.read_results(RESULTS)
    text = report.page(results)
    older = {name for name in results if name.startswith("NVIDIA")} - set(report_gpu.by_machine(results))
    assert all(f"### {name}\n" in text for name in set(results) - older)


def _result(date: str, gpus: int, step_ms: float, peer_ms: float | None) -> dict[str, Any]:
    peer = peer_ms and {"ttft_ms": 30.0, "step_ms": peer_ms, "tokens_per_s": 100.0}
    row = {"kind": "lat", "batch": 1, "in": 128, "out": 256, "ttft_ms": 25.0, "step_ms": step_ms, "tokens_per_s": 200.0,
           "model": "7B", "tp": gpus, "floor_ms": 3.0, "goals": {"step_ms": 3.5}, "missed": ["step_ms"],
           "peer": peer}  # fmt: skip
    return {
        "command": "c --peer /x",
        "commit": "abc",
        "date": date,
        "machine": {},
        "figures": {"gpus": gpus, "rows": [row]},
    }


def test_the_newest_result_of_a_machine_counts_and_the_better_figure_is_bold() -> None:
    results = {
        "NVIDIA-x1-b": _result("2026-01-01", 1, 9.0, None), "NVIDIA-x1-a": _result("2026-01-02", 1, 4.0, 5.0),
        "NVIDIA-x2-c": _result("2026-01-01", 2, 6.0, 5.5),
    }  # fmt: skip
    assert report_gpu.by_machine(results) == ["NVIDIA-x1-a", "NVIDIA-x2-c"]
    summary = report_gpu.summary(results)
    cells = [cell.strip() for cell in summary.splitlines()[2].split("|")[1:-1]]
    assert cells == ["batch 1, 128 in: ms a token", "**4.00** (75%)", "5.00", "6.00 (50%)", "**5.50**"]
    text = report.page(results)
    assert "step_ms 3.5 missed" in text
    assert "/x" not in text
    assert "7B TP 1, batch 1, 128 in, 256 out: a step" in text


def test_gaps_between_steps_are_shown_where_they_were_measured() -> None:
    result = _result("2026-01-01", 1, 4.0, None)
    assert "gap" not in report_gpu.table(result)
    rows = result["figures"]["rows"]
    rows.append({**rows[0], "in": 1024, "gap_us": {"median": 20.4, "p99": 31.0, "longest": 99.0, "steps": 99}})
    text = report_gpu.table(result)
    assert "gap µs (p99)" in text
    assert text.count("20 (31)") == 1


@pytest.mark.parametrize(("said", "shown"), [({}, True), ({"first": False}, False)])
def test_a_start_that_found_kernels_on_disk_is_not_called_the_first(said: dict[str, bool], shown: bool) -> None:
    result = _result("2026-01-01", 1, 4.0, None)
    result["figures"]["rows"].append(
        {"kind": "start", "batch": 1, "in": 8, "out": 1, "start_s": 20.0, "model": "7B", "tp": 1, "goals": {},
         "missed": [], "roofline": {}, **said}
    )  # fmt: skip
    assert ("a start without kernels on disk" in report_gpu.summary({"NVIDIA-x1-a": result})) == shown
    assert ("a start without kernels on disk" in report_gpu.table(result)) == shown


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nz"
    assert report.between_markers(text, "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nz"
    with pytest.raises(ValueError, match="once each"):
        report.between_markers("a", "new")


def test_any_result_can_be_shown(tmp_path: Path) -> None:
    figures = {
        "one": 1.5,
        "rows": [{"a": 1, "b": {"c": [1, 2]}}, {"a": 2}],
        "by": {"x": {"y": 3}},
        "many": {"p": {}, "q": 1},
    }
    write_json(tmp_path / "some" / "thing.json", "make thing", figures)
    told = json.loads((tmp_path / "some" / "thing.json").read_text())
    assert told["figures"] == figures
    assert told["machine"]["torch"]
    text = report.page(report.read_results(tmp_path / "some"))
    for part in ("### thing", "`make thing`", "| one    |   1.5 |", "| 1   | 1, 2 |", "| x   |   3 |", "| many q |"):
        assert part in text, text


def test_a_table_can_be_pasted() -> None:
    table = markdown(["", "ms", "n"], [["a|b", 1234.5, None], ["c", 0.12345, 7]])
    assert table.splitlines() == [
        "|      |    ms |   n |",
        "| ---- | ----: | --: |",
        "| a\\|b | 1,234 |     |",
        "| c    | 0.123 |   7 |",
    ]
