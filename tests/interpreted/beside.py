"""Programs that need Triton, where the tests' own environment has none: beside it, where `make test` puts it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = Path(sys.prefix) / "interpreted"
TIMEOUT_S = 900  # beside other tests, which go first, it gets what they leave


def found_by(module: str, out: Path, env: dict[str, str]) -> Any:
    """What a module of this folder writes to `out`, as JSON; the test is skipped where there is no Triton."""
    if importlib.util.find_spec("triton") is None and not (BESIDE / "triton").is_dir():
        pytest.skip("Triton is not installed: make test")
    env = os.environ | env | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(BESIDE)))}
    # Others measure time meanwhile.
    command = ["nice", "-n", "5", sys.executable, "-m", f"tests.interpreted.{module}", str(out)]
    subprocess.run(command, cwd=ROOT, env=env, timeout=TIMEOUT_S, check=True)
    return json.loads(out.read_text())
