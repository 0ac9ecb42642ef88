"""The engine on GPUs beside a peer: `python -m tpserve.bench.gpu [--peer COMMAND]` measures every row of this machine's
table, after checking every kernel; `--model 7B --tp 1` measures one model only. `engine_runs` says how.

The peer's command is run after ours, model by model, on the same machine; `{model}`, `{tp}`, `{batches}`, `{prompts}`
and `{requests}` stand for what it is to measure. The environment variable OUT names a folder into which it writes its
rows as JSON lists [kind, batch, in, out, ttft_ms, step_ms, tokens_per_s, …].

A row's goal is the least that it must reach. Exit status 1: a kernel is wrong, or a row misses its goal.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fire
import torch

from tpserve.bench import roofline
from tpserve.bench.engine_runs import MODELS, Engine, latency, throughput
from tpserve.bench.record import write_result

Key = tuple[str, int, int]  # kind, batch, tokens in
_TESTS_AT_A_TIME = 8


@dataclasses.dataclass(frozen=True)
class Measure:
    """One model at one TP size.

    Attributes:
        batches, prompts: of the latency rows: every pair of them.
        requests: of the throughput rows (512 tokens in, 256 out).
        goals: of a row: (figure, value); "start_s" under ("start", 1, 8).
    """

    model: str
    tp: int
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (128, 1024)
    requests: tuple[int, ...] = ()
    goals: dict[Key, dict[str, float]] = dataclasses.field(default_factory=dict)


# By the number of GPUs of the machine. Goals are at least a tenth better than what vLLM 0.26 was first measured at.
SUITE: dict[int, tuple[Measure, ...]] = {
    1: (
        Measure(
            "7B", 1, requests=(64, 256),
            goals={
                ("lat", 1, 128): {"step_ms": 3.7, "ttft_ms": 7.0}, ("lat", 1, 1024): {"ttft_ms": 23.0},
                ("lat", 8, 1024): {"step_ms": 5.0}, ("thr", 64, 512): {"tokens_per_s": 5400.0},
                ("thr", 256, 512): {"tokens_per_s": 6900.0}, ("start", 1, 8): {"start_s": 30.0},
            },
        ),
    ),
    2: (
        Measure(
            "7B", 2, requests=(256,),
            goals={
                ("lat", 1, 128): {"step_ms": 2.3}, ("lat", 8, 1024): {"step_ms": 3.0},
                ("thr", 256, 512): {"tokens_per_s": 11500.0},
            },
        ),
    ),
    4: (
        Measure("7B", 4, goals={("lat", 1, 128): {"step_ms": 1.45}}),
        Measure(
            "70B", 4, requests=(256,),
            goals={
                ("lat", 1, 128): {"step_ms": 9.8}, ("lat", 8, 1024): {"step_ms": 11.9},
                ("thr", 256, 512): {"tokens_per_s": 4600.0},
            },
        ),
    ),
}  # fmt: skip


def measure(
    what: Measure,
    dtype: str,
    new: int,
    bandwidth: float,
    options: dict[str, Any],
    ceilings: roofline.Ceilings | None = None,
) -> list[dict[str, Any]]:
    """Runs our engine.

    Args:
        what: the rows.
        dtype: of weights and activations.
        new: tokens of a latency run.
        bandwidth: of the device's memory, bytes a second.
        options: keys of the engine's configuration, and sampling fields.
        ceilings: of one of the devices, as just measured; None: no rooflines.
    """
    with tempfile.TemporaryDirectory() as folder, _environment("TRITON_CACHE_DIR", folder):
        # Without kernels that another model or a test has left on disk; libraries may be in memory from before.
        engine = Engine(what.model, what.tp, dtype, **options)
        try:
            rows = [latency(engine, b, p, new) for b in what.batches for p in what.prompts]
            rows += [throughput(engine, n, 512, 256) for n in what.requests]
        finally:
            engine.close()
    rows.append({"kind": "start", "batch": 1, "in": 8, "out": 1, "start_s": engine.start_s})
    itemsize = getattr(torch, dtype).itemsize
    for row in rows:
        row |= {"model": Path(what.model).name, "tp": what.tp}
        if row["kind"] == "lat":
            step = roofline.decode(
                engine.args, what.tp, row["batch"], row["in"] + new // 2, itemsize, block_bytes=engine.block_bytes
            )
            row["floor_ms"] = 1e3 * step.bytes / bandwidth
        if ceilings is not None:
            row["roofline"] = roofline.of_row(row, engine.args, what.tp, ceilings, itemsize, engine.block_bytes)
        goals = what.goals.get((row["kind"], row["batch"], row["in"]), {})
        row["goals"] = goals
        row["missed"] = [name for name, goal in goals.items() if not _reached(name, row[name], goal)]
    return rows


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable, inside, for this process and those that it starts."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _reached(name: str, value: float, goal: float) -> bool:
    return value >= goal if name == "tokens_per_s" else value <= goal


def add_peer(rows: list[dict[str, Any]], what: Measure, command: str) -> None:
    """Runs the peer, and puts its figures beside ours."""
    values = {"model": what.model, "tp": what.tp, "batches": what.batches, "prompts": what.prompts,
              "requests": what.requests}  # fmt: skip
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        command = command.replace(f"{{{name}}}", text)
    with tempfile.TemporaryDirectory() as folder:
        # What it could measure before it failed counts.
        done = subprocess.run(command, shell=True, env=os.environ | {"OUT": folder}, check=False)
        if done.returncode:
            print(f"the peer ended with status {done.returncode}", flush=True)
        theirs = [row for path in Path(folder).glob("*.json") for row in json.loads(path.read_text())]
    names = ("ttft_ms", "step_ms", "tokens_per_s")
    by_key = {(row[0], row[1], row[2]): dict(zip(names, row[4:7], strict=True)) for row in theirs}
    for row in rows:
        peer = row["peer"] = by_key.get((row["kind"], row["batch"], row["in"]))
        if peer and row["kind"] == "thr":  # its other columns say something else there
            row["peer"] = {"ttft_ms": 0.0, "step_ms": 0.0, "tokens_per_s": peer["tokens_per_s"]}


def check_kernels() -> dict[str, Any]:
    """Runs the GPU tests, which compare every kernel with float64 or float32 references, on fresh random inputs;
    several at a time, for most of it is compiling.

    Returns:
        "seed", "passed", "failed"; zeros where the tests are not beside the package.
    """
    seed = int.from_bytes(os.urandom(4), "little")
    root = Path(__file__).resolve().parents[1]
    if not (root / "tests" / "gpu").is_dir():
        return {"seed": seed, "passed": 0, "failed": 0}
    folder = tempfile.TemporaryDirectory()
    env = os.environ | {"TPSERVE_TEST_SEED": str(seed), "TRITON_CACHE_DIR": folder.name}

    def pytest(*which: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                   "-W", "ignore::pytest.PytestConfigWarning", *which]  # fmt: skip
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)

    collected = pytest("--collect-only", "tests/gpu")
    tests = sorted({line.partition("[")[0] for line in collected.stdout.splitlines() if "::" in line})
    counts = collections.Counter({"failed": int(collected.returncode != 0)})  # a file that cannot be imported, too
    if collected.returncode:
        print(collected.stdout[-2000:], flush=True)
    with folder, ThreadPoolExecutor(_TESTS_AT_A_TIME) as pool:
        for test, done in zip(tests, pool.map(pytest, tests), strict=True):
            found = re.findall(r"(\d+) (passed|failed|error|skipped)", (done.stdout.strip().splitlines() or [""])[-1])
            counts.update({word: int(number) for number, word in found})
            counts["failed"] += not found or done.returncode not in (0, 1)  # 1: tests failed, and are counted
            if done.returncode or not found:
                print(f"{test}\n{done.stdout[-2000:]}{done.stderr[-500:]}", flush=True)
    print(f"kernels, seed {seed}: {dict(counts)}", flush=True)
    return {"seed": seed, "passed": counts["passed"], "failed": counts["failed"] + counts["error"]}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row: ours, the floor's share of it, the device's gap between two steps, the peer's, and the goals that
    it misses; its rooflines below."""
    print(f"{'model':6}{'TP':>3} {'kind':6}{'batch':>6}{'in':>6}{'TTFT ms':>9}{'ms/step':>9}{'of floor':>9}"
          f"{'tokens/s':>10}{'gap us':>8}{'p99':>6}{'peer TTFT':>10}{'peer step':>10}{'peer t/s':>10}"
          "  misses")  # fmt: skip
    for row in rows:
        line = f"{row['model']:6}{row['tp']:>3} {row['kind']:6}{row['batch']:>6}{row['in']:>6}"
        if row["kind"] == "start":
            line += f"{row['start_s']:>9.1f} s from the start to the first token"
        else:
            share = f"{row['floor_ms'] / row['step_ms']:>9.0%}" if row["kind"] == "lat" else f"{'':9}"
            gap = row["gap_us"]
            line += f"{row['ttft_ms']:>9.2f}{row['step_ms']:>9.3f}{share}{row['tokens_per_s']:>10.0f}"
            line += f"{gap['median']:>8.0f}{gap['p99']:>6.0f}" if gap else f"{'':14}"
            peer = row.get("peer")
            line += f"{peer['ttft_ms']:>10.2f}{peer['step_ms']:>10.3f}{peer['tokens_per_s']:>10.0f}" if peer else ""
        print(line, "", ", ".join(f"{name} ({row['goals'][name]:g})" for name in row["missed"]))
        for what, one in row.get("roofline", {}).items():
            print(f"  {roofline.line(what, one)}")


def main(
    model: str = "",
    tp: int = 1,
    batches: str = "1,8",
    prompts: str = "128,1024",
    requests: str = "64,256",
    new: int = 256,
    bandwidth: float = 4.24e12,
    dtype: str = "bfloat16",
    peer: str = "",
    check: bool = True,
    **options: Any,
) -> None:
    """Measures and prints the table.

    Args:
        model: a key of `engine_runs.MODELS`, or a checkpoint of any form; empty: everything that this machine's GPUs
            are measured at.
        tp, batches, prompts, requests: of that one model; lists with commas.
        new: tokens of a latency run.
        bandwidth: of the device's memory, bytes a second.
        dtype: of weights and activations.
        peer: a command that measures the same of something else.
        check: kernels first (not with `model`).
        options: keys of the engine's configuration, and sampling fields: `--temperature 0.6 --top_p 0.9`.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kernels: dict[str, Any] = {}
    if model:
        lists = [tuple(int(x) for x in str(text).strip("()").split(",") if x.strip())
                 for text in (batches, prompts, requests)]  # fmt: skip
        suite: tuple[Measure, ...] = (Measure(model, tp, lists[0], lists[1], lists[2]),)
    else:
        if gpus not in SUITE:
            sys.exit(f"this machine has {gpus} GPUs; rows are known for {', '.join(map(str, SUITE))}")
        suite = SUITE[gpus]
        kernels = check_kernels() if check else {}
    kind = str(options.get("device", "cuda"))
    ceilings = roofline.measured("cuda", dtype) if gpus and kind != "cpu" else None
    rows: list[dict[str, Any]] = []
    for what in suite:
        ours = measure(what, dtype, new, bandwidth, options, ceilings)
        if peer:
            add_peer(ours, what, peer)
        rows += ours
    print_table(rows)
    device = torch.cuda.get_device_name() if gpus else "CPU"
    figures = {"device": device, "gpus": gpus, "dtype": dtype, "kernels": kernels, "options": options, "rows": rows}
    drawn = "_sampled" if options.get("temperature") else ""
    label = model if model in MODELS else f"checkpoint_{Path(model).name}"
    name = f"gpu_{label}_tp{tp}{drawn}" if model else f"{device.replace(' ', '-')}-x{gpus}-{commit()}"
    write_result(name, f"python -m tpserve.bench.gpu {' '.join(sys.argv[1:])}".strip(), figures)
    sys.exit(bool(kernels.get("failed") or any(row["missed"] for row in rows)))


def commit() -> str:
    """The repository's; "unknown" where there is none."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                         text=True, check=False)  # fmt: skip
    return git.stdout.strip() or os.environ.get("TPSERVE_COMMIT", "unknown")


if __name__ == "__main__":
    fire.Fire(main)
