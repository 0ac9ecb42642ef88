"""Run by test_memory.py: `python -m tests.convert.memory_pairs FOLDER GIB`, peak memory of every conversion and load.

The kernel keeps the peak of a process's resident memory, and sets it back on request (proc(5), clear_refs).
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import tpserve.convert.gguf_source
import tpserve.convert.hf_source
import tpserve.model.loader  # noqa: F401
from tpserve.bench.convert_inputs import FORMS, Widths, write_form, write_synthetic_checkpoint
from tpserve.bench.convert_memory import load_rank
from tpserve.convert.convert import convert

# A checkpoint of 80 MiB is small: so are the blocks that are worked on then.
_BLOCKS = {"BLOCK_BYTES": 16 << 20, "_SLAB_BYTES": 32 << 20}
_TARGETS = (("dcp", None), ("safetensors", None), ("hf", None), ("meta", None), ("dcp", "int4"))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _growth_mib(work: Callable[[], int]) -> float:
    """What `work` adds at its peak, less the bytes that it says stay."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    stays = work()
    return (_kib("VmHWM") - before) / 1024 - stays / 2**20


def main(folder: Path, gib: float) -> None:
    """Writes {"FORM to TARGET": MiB} as JSON, and the size of the checkpoint."""
    for module in [module for name, module in sys.modules.items() if name.startswith("tpserve.")]:
        for name, usual in _BLOCKS.items():
            if getattr(module, name, None) == usual:
                setattr(module, name, usual // 16)
    meta = folder / "meta"
    size = write_synthetic_checkpoint(meta, gib, 8192, Widths(1024, 2816, 16))
    found = {}
    for form in FORMS:
        source = write_form(form, meta, folder)
        for target, scheme in _TARGETS:
            if scheme is not None and form not in ("meta", "gguf"):
                continue  # quantising is the same work, whatever is read

            def run(target: str = target, scheme: str | None = scheme, source: Path = source) -> int:
                convert(source, folder / "out", format=target, quantize=scheme, progress=False)
                return 0

            found[f"{form} to {target} {scheme or ''}".strip()] = _growth_mib(run)
            shutil.rmtree(folder / "out")
        found[f"{form} loaded"] = _growth_mib(lambda source=source: load_rank(source))  # type: ignore[misc]
    sys.stdout.write(json.dumps({"checkpoint_mib": size / 2**20, "peaks_mib": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
