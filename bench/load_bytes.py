"""Bytes that each rank of a tensor-parallel load reads: `python -m tpserve.bench.load_bytes [--tp 4]`.

A synthetic bf16 checkpoint is converted, and `torchrun` starts ranks that load it through
`tpserve.model.loader.load_model`, all at once. Three figures a rank, in bytes:

- own: its parameters, as they lie in its memory afterwards (the replicated embedding and norms count in full);
- copied: what the reader copied out of the files, by its own count;
- from_disk: what the block device delivered because of this process (`read_bytes` in /proc/self/io). The loader maps
  files, so `rchar` would not see it; `read_bytes` does, with read-ahead and whole pages: the upper bound. For that
  every rank gets a copy of the folder of its own, dropped from the page cache first, so that no rank is served by
  another's reading.

Exit status 1: a rank read more than 1.1 times its own bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import torch.distributed as dist

from tpserve.bench.convert_inputs import write_synthetic_checkpoint
from tpserve.bench.record import write_result
from tpserve.convert.convert import convert
from tpserve.model.loader import load_model

LIMIT = 1.1
_FOLDER = "TPSERVE_BENCH_FOLDER"


def main(tp: int = 4, gib: float = 0.4) -> None:
    """Measures one load.

    Args:
        tp: number of ranks.
        gib: least size of the checkpoint, in GiB.
    """
    with tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        source = Path(folder) / "in"
        checkpoint_bytes = write_synthetic_checkpoint(source, gib, vocab_size=4096)
        converted = convert(source, Path(folder) / "out")
        shutil.rmtree(source)
        for rank in range(tp):
            shutil.copytree(converted, Path(folder) / f"rank{rank}")
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(tp)]
        environment = os.environ | {_FOLDER: folder, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *torchrun, "-m", "tpserve.bench.load_bytes"], env=environment, check=True)
        ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(tp)]
    if not all(rank["from_disk"] for rank in ranks):
        raise SystemExit("the temporary folder is not on a disk (tmpfs?): set TMPDIR to one that is")
    worst = max(max(rank["from_disk"], rank["copied"]) / rank["own"] for rank in ranks)
    figures = {
        "checkpoint_bytes": checkpoint_bytes,
        "tp": tp,
        "ranks": ranks,
        "worst_ratio": round(worst, 4),
        "limit": LIMIT,
    }
    write_result("load_bytes", f"python -m tpserve.bench.load_bytes --tp {tp} --gib {gib}", figures)
    if worst > LIMIT:
        raise SystemExit(1)


def _measure_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own_copy = folder / f"rank{rank}"
    _drop_from_page_cache(own_copy)
    dist.barrier()
    before = _bytes_from_disk()
    loaded = load_model(own_copy)
    figures: dict[str, Any] = {
        "own": sum(p.nbytes for p in loaded.model.parameters()),
        "copied": loaded.bytes_read,
        "from_disk": _bytes_from_disk() - before,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())  # only clean pages can be dropped
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


if __name__ == "__main__":
    if "RANK" in os.environ and _FOLDER in os.environ:
        _measure_rank(Path(os.environ[_FOLDER]))
    else:
        fire.Fire(main)
