"""Kernels of the GPU path, compiled for a GPU that is not here: see `hopper.py`."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.interpreted.beside import TIMEOUT_S, found_by

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S + 60)
SHARED_BYTES = 227 << 10  # of a Hopper GPU's program, by CUDA's table of compute capabilities
SOME = {"_prefill_kernel", "_decode_kernel", "_product_kernel", "_qkv_kernel", "_gate_up_kernel", "_sum_kernel"}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of a machine's first start, and of its second: what is on disk after it, and what was told."""
    folder = tmp_path_factory.mktemp("hopper")
    env = {"TRITON_CACHE_DIR": str(folder / "kernels")}
    return [found_by("hopper", folder / f"{i}.json", env) for i in range(2)]


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
