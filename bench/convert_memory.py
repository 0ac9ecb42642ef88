"""Peak memory of every conversion and of loading every form: `python -m tpserve.bench.convert_memory [--gib 1.6]`.

A synthetic bf16 checkpoint with the widths of Llama-2 7B and as many layers as fill `--gib` is made in every form that
is read (`convert_inputs.py`). Each is converted to every form that is written by the real command, and loaded as one of
two ranks; each time in a fresh process, whose /proc/PID/status is sampled every 2 ms. VmRSS is what counts: private
memory (RssAnon: chunks, Python, torch's heap) plus mapped files (the checkpoint's, torch's libraries). VmHWM, the
kernel's own peak, covers what falls between two samples. Of a load the rank's own weights are taken off. Exit status 1:
a peak reached the limit of 700 MiB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire

from tpserve.bench.convert_inputs import FORMS, write_form, write_synthetic_checkpoint
from tpserve.bench.record import RESULTS, markdown, write_json

LIMIT_MIB = 700
TARGETS = ("dcp", "safetensors", "hf", "meta", "dcp int4", "load")
_SAMPLE_S = 0.002
_TP = 2


def main(gib: float = 1.6, forms: Any = FORMS, targets: Any = TARGETS) -> None:
    """Measures every pair.

    Args:
        gib: least size of the checkpoint, in GiB.
        forms: that are read, comma-separated.
        targets: what is done with them, comma-separated; "load" is loading one of two ranks.
    """
    rows: list[dict[str, Any]] = []
    wanted, asked = _names(forms), _names(targets)
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        meta = Path(folder) / "meta"
        checkpoint_bytes = write_synthetic_checkpoint(meta, gib, vocab_size=32000)
        for form in wanted:
            source = write_form(form, meta, Path(folder))
            for target in asked:
                row = {"from": form, "to": target} | _measure(source, target, Path(folder) / "out")
                rows.append(row)
                print(*(f"{key} {value}" for key, value in row.items()), flush=True)
                shutil.rmtree(Path(folder) / "out", ignore_errors=True)
            if form not in ("meta", "hf"):  # of which the others are made
                shutil.rmtree(Path(folder) / form)
    worst_mib = max(row["peak_rss_mib"] for row in rows)
    size_gib = round(checkpoint_bytes / 2**30, 3)
    figures = {"checkpoint_gib": size_gib, "limit_mib": LIMIT_MIB, "peak_rss_mib": worst_mib, "rows": rows}
    command = f"python -m tpserve.bench.convert_memory {' '.join(sys.argv[1:])}".strip()
    write_json(RESULTS / "convert_memory.json", command, figures)
    table = {(row["from"], row["to"]): row["peak_rss_mib"] for row in rows}
    print(markdown(["MiB", *asked], [[form, *(round(table[form, target]) for target in asked)] for form in wanted]))
    if worst_mib >= LIMIT_MIB:
        raise SystemExit(1)


def load_rank(checkpoint: Path) -> int:
    """Loads the first of two ranks as a server does; the bytes of its weights."""
    from tpserve.engine.config import EngineConfig
    from tpserve.engine.weights import open_weights
    from tpserve.model.loader import load_model
    from tpserve.model.parallel import TensorParallel
    from tpserve.model.quantized import weight_bytes

    config = EngineConfig(checkpoint_dir=str(checkpoint), tensor_parallel_size=_TP)
    loaded = load_model(checkpoint, tp=TensorParallel(0, _TP), source=open_weights(config))
    return weight_bytes(loaded.model)


def _names(asked: str | Sequence[str]) -> list[str]:
    return asked.split(",") if isinstance(asked, str) else list(asked)


def _measure(source: Path, target: str, out: Path) -> dict[str, Any]:
    format, _, scheme = target.partition(" ")
    if target == "load":
        command = ["-m", "tpserve.bench.convert_memory", "load-rank", str(source)]
    else:
        command = ["-m", "tpserve.convert", "--ckpt_dir", str(source), "--out_dir", str(out), "--format", format]
        command += ["--quantize", scheme] if scheme else []
    started_s = time.perf_counter()
    peaks_kib = {"VmRSS": 0, "VmHWM": 0, "RssAnon": 0, "RssFile": 0}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            for key, value in _memory_kib(process.pid).items():
                peaks_kib[key] = max(peaks_kib[key], value)
            time.sleep(_SAMPLE_S)
        seconds = time.perf_counter() - started_s
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed with exit status {process.returncode}")
        said.seek(0)
        own_bytes = int(said.read()) if target == "load" else 0
    return {
        "peak_rss_mib": round(max(peaks_kib["VmRSS"], peaks_kib["VmHWM"]) / 1024 - own_bytes / 2**20, 1),
        "own_weights_mib": round(own_bytes / 2**20, 1),
        "peak_anonymous_mib": round(peaks_kib["RssAnon"] / 1024 - own_bytes / 2**20, 1),
        "peak_mapped_files_mib": round(peaks_kib["RssFile"] / 1024, 1),
        "seconds_with_imports": round(seconds, 1),
    }


def _memory_kib(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    wanted = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(wanted)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["load-rank"]:
        print(load_rank(Path(sys.argv[2])))
    else:
        fire.Fire(main)
