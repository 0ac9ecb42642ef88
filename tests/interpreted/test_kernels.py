"""Kernels of the GPU path, on a CPU: see `checks.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted.checks import CHECKS

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix) / "interpreted"  # where `make test` puts it


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By check, what went wrong."""
    if importlib.util.find_spec("triton") is None and not (BESIDE / "triton").is_dir():
        pytest.skip("Triton is not installed: make test")
    out = tmp_path_factory.mktemp("interpreted") / "found.json"
    paths = os.pathsep.join((str(ROOT), str(BESIDE)))
    subprocess.run(
        [sys.executable, "-m", "tests.interpreted.checks", str(out)], cwd=ROOT, timeout=280, check=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    told: dict[str, str] = json.loads(out.read_text())
    return told


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_are_what_torch_computes(found: dict[str, str], check: str) -> None:
    assert not found[check], found[check]
