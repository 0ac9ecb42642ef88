"""Kernels of the GPU path, compiled for a GPU that is not here: see `hopper.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.interpreted.test_kernels import BESIDE, ROOT

SHARED_BYTES = 227 << 10  # of a Hopper GPU's program, by CUDA's table of compute capabilities
SOME = {"_prefill_kernel", "_decode_kernel", "_product_kernel", "_qkv_kernel", "_gate_up_kernel", "_sum_kernel"}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a machine's first start, and of its second: what is on disk after it, and what was told."""
    if importlib.util.find_spec("triton") is None and not (BESIDE / "triton").is_dir():
        pytest.skip("Triton is not installed: make test")
    folder, found = tmp_path_factory.mktemp("hopper"), []
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(BESIDE))), "TRITON_CACHE_DIR": str(folder / "kernels"),
    }  # fmt: skip
    for i in range(2):
        out = folder / f"{i}.json"
        # Others measure time meanwhile.
        command = ["nice", "-n", "10", sys.executable, "-m", "tests.interpreted.hopper", str(out)]
        subprocess.run(command, cwd=ROOT, env=env, timeout=280, check=True)
        found.append(json.loads(out.read_text()))
    return found


def test_every_kernel_compiles(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["told"] == []
    assert set(starts[0]["names"]) >= SOME
    assert starts[0]["shared"] <= SHARED_BYTES


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor is not shared among forks")
def test_forks_compile_them(starts: list[dict[str, Any]]) -> None:
    """All but one of each rank, which shows, by a listener of its own, that none is on disk yet."""
    assert starts[0]["here"] == []


def test_another_start_finds_all_of_them(starts: list[dict[str, Any]]) -> None:
    assert starts[1] == starts[0]
