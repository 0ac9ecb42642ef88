"""Peak memory of a conversion: `python -m tpserve.bench.convert_memory [--gib 1.6]`.

A synthetic bf16 checkpoint with the widths of Llama-2 7B and as many layers as fill `--gib` is written as two Fairscale
shards and converted by the real command in a fresh process, whose /proc/PID/status is sampled every 2 ms. VmRSS is what
counts: private memory (RssAnon: chunks, Python, torch's heap) plus mapped files (shards, torch's libraries). VmHWM, the
kernel's own peak, covers what falls between two samples. Exit status 1: the peak reached the limit of 700 MiB.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import torch

from tpserve.bench.record import write_result

LIMIT_MIB = 700
_SHARDS = 2
_DIM, _FFN_DIM = 4096, 11008
_PARAMS = {"dim": _DIM, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
_SAMPLE_S = 0.002


def main(gib: float = 1.6) -> None:
    """Measures one conversion.

    Args:
        gib: least size of the checkpoint, in GiB.
    """
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        checkpoint_bytes = write_synthetic_checkpoint(Path(folder) / "in", gib, vocab_size=32000)
        flags = ["--ckpt_dir", f"{folder}/in", "--out_dir", f"{folder}/out"]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "tpserve.convert", *flags])
        peaks_kib = {"VmRSS": 0, "VmHWM": 0, "RssAnon": 0, "RssFile": 0}
        while process.poll() is None:
            for key, value in _memory_kib(process.pid).items():
                peaks_kib[key] = max(peaks_kib[key], value)
            time.sleep(_SAMPLE_S)
        seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(f"the conversion failed with exit status {process.returncode}")
    peak_mib = max(peaks_kib["VmRSS"], peaks_kib["VmHWM"]) / 1024
    figures = {
        "checkpoint_gib": round(checkpoint_bytes / 2**30, 3),
        "peak_rss_mib": round(peak_mib, 1),
        "peak_anonymous_mib": round(peaks_kib["RssAnon"] / 1024, 1),
        "peak_mapped_files_mib": round(peaks_kib["RssFile"] / 1024, 1),
        "limit_mib": LIMIT_MIB,
        "seconds_with_imports": round(seconds, 2),
    }
    write_result("convert_memory", f"python -m tpserve.bench.convert_memory --gib {gib}", figures)
    if peak_mib >= LIMIT_MIB:
        raise SystemExit(1)


def write_synthetic_checkpoint(folder: Path, gib: float, vocab_size: int) -> int:
    """Writes a random bf16 checkpoint with Llama-2 7B's widths in two Fairscale shards.

    Args:
        folder: made here.
        gib: its least size in GiB; layers are added until it is reached.
        vocab_size: rows of the embedding.

    Returns:
        The size of the weights in bytes, all shards together.
    """
    dim, half, part = _DIM, _DIM // _SHARDS, _FFN_DIM // _SHARDS
    layer = {f"attention.{name}.weight": (half, dim) for name in ("wq", "wk", "wv")}
    layer |= {"attention.wo.weight": (dim, half), "feed_forward.w2.weight": (dim, part)}
    layer |= {"feed_forward.w1.weight": (part, dim), "feed_forward.w3.weight": (part, dim)}
    layer_bytes = 2 * _SHARDS * sum(rows * columns for rows, columns in layer.values())
    ends_bytes = 2 * 2 * vocab_size * dim
    n_layers = max(1, math.ceil((gib * 2**30 - ends_bytes) / layer_bytes))
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**_PARAMS, "n_layers": n_layers}))
    for rank in range(_SHARDS):
        generator = torch.Generator().manual_seed(rank)

        def random(rows: int, columns: int, generator: torch.Generator = generator) -> torch.Tensor:
            bits = torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16, generator=generator)
            return bits.view(torch.bfloat16)

        shard = {"tok_embeddings.weight": random(vocab_size, half), "norm.weight": torch.ones(dim).bfloat16()}
        for i in range(n_layers):
            shard |= {f"layers.{i}.{name}": random(*shape) for name, shape in layer.items()}
            shard |= {f"layers.{i}.{n}.weight": shard["norm.weight"].clone() for n in ("attention_norm", "ffn_norm")}
        shard["output.weight"] = random(vocab_size // _SHARDS, dim)
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
        del shard
    return n_layers * layer_bytes + ends_bytes


def _memory_kib(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    wanted = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(wanted)}


if __name__ == "__main__":
    fire.Fire(main)
