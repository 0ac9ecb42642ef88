"""`tpserve bench …` as users type it, on tiny networks and on a server of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data import DEMO_CHECKPOINT
from tests.helpers.stories import converted
from tpserve.cli.bench import with_joined_objectives
from tpserve.convert.convert import convert


def bench(*words: str, status: int = 0) -> str:
    """What the command prints; stderr, where it fails."""
    command = [sys.executable, "-m", "tpserve.cli.main", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def test_objectives_are_one_value() -> None:
    words = ["bench", "serve", "--goodput", "ttft:500", "itl:50", "--rate", "2"]
    assert with_joined_objectives(words) == ["bench", "serve", "--goodput", "ttft:500,itl:50", "--rate", "2"]
    assert with_joined_objectives(["--goodput=ttft:5", "e2e:9.5"]) == ["--goodput=ttft:5,e2e:9.5"]
    assert with_joined_objectives(["--url", "a:1", "b:2"]) == ["--url", "a:1", "b:2"]


def test_latency_of_the_demo_model_beside_a_peer(tmp_path: Path) -> None:
    checkpoint = str(convert(DEMO_CHECKPOINT, tmp_path / "demo", progress=False))
    peer = tmp_path / "peer.py"
    peer.write_text(
        "import json, os, sys\n"
        "rows = [['lat', b, n, 60, 1000.0, 100.0, 10.0] for b in (1, 2) for n in (8,)]\n"
        f"assert sys.argv[1:] == [{checkpoint!r}, '1', '1,2', '8', '']\n"
        "json.dump(rows, open(os.environ['OUT'] + '/rows.json', 'w'))\n"
    )
    out = bench(
        "latency", checkpoint, "--batch", "1,2", "--input_len", "8", "--output_len", "60", "--device", "cpu",
        "--pairs", "1", "--out", str(tmp_path / "o.json"), "--against",
        f"{sys.executable} {peer} {{model}} {{tp}} {{batches}} {{prompts}} '{{requests}}'",
    )  # fmt: skip
    figures = json.loads((tmp_path / "o.json").read_text())["figures"]
    assert [(row["batch"], row["in"], row["out"]) for row in figures["rows"]] == [(1, 8, 60), (2, 8, 60)]
    for row in figures["rows"]:
        assert row["ratios"]["ttft_ms"]["ratio"] == pytest.approx(row["ttft_ms"] / 1000, rel=1e-2, abs=1e-4)
        assert 0 < row["roofline"]["a step"]["share"] < 1
        assert row["fastest"]["ttft_ms"] <= row["ttft_ms"]
        assert row["step_ms"] > 0
        assert row["gap_us"] is None or 0 <= row["gap_us"]["median"] <= row["gap_us"]["p99"] <= row["gap_us"]["longest"]
    assert any(row["gap_us"] for row in figures["rows"]), "the device's gaps were not measured"
    assert "| 1 x 8 in, 60 out |" in out
    assert "roofline, a step:" in out


def test_throughput_of_stories260k(tmp_path: Path) -> None:
    out = bench(
        "throughput", str(converted(tmp_path)), "--requests", "3", "--input_len", "8", "--output_len", "4",
        "--device", "cpu", "--out", str(tmp_path / "o.json"), "--max_num_seqs", "4",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "o.json").read_text())["figures"]["rows"]
    assert row["tokens_per_s"] > 1
    assert row["roofline"]["the run"]["ms"] == pytest.approx(1e3 * 12 / row["tokens_per_s"])
    assert "| 3 x 8 in, 4 out |" in out


def test_serving_the_demo_model(tmp_path: Path) -> None:
    """Ours is started, asked by text of exact lengths, and gone afterwards."""
    checkpoint = convert(DEMO_CHECKPOINT, tmp_path / "demo", progress=False)
    serve = f"{sys.executable} -m tpserve.cli.main serve --checkpoint {checkpoint} --port {{port}} --device cpu"
    out = bench(
        "serve", "--start", f"OMP_NUM_THREADS=1 {serve} --standby False", "--tokenizer", str(checkpoint),
        "--rate", "20", "--requests", "6", "--input_len", "20", "--output_len", "5", "--goodput", "ttft:60000",
        "itl:60000", "--out", str(tmp_path / "o.json"),
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "o.json").read_text())["figures"]["rows"]
    assert (row["failed"], row["prompt_tokens"], row["output_tokens"]) == (0, 6 * 20, 6 * 5)
    assert row["goodput"]["share"] == 1.0
    assert "(100%)" in out
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True, env=os.environ).stdout
    assert str(checkpoint) not in left


def test_mistakes_are_told() -> None:
    assert "error: model must be" in bench("latency", "90B", status=2)
    assert "error: 'nowhere' is no URL" in bench("serve", "--url", "nowhere", status=2)
