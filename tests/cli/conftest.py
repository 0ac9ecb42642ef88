"""The bundled demo model, and the command as users type it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.data import DEMO_CHECKPOINT
from tpserve.convert.convert import convert

TPSERVE = [sys.executable, "-m", "tpserve.cli.main"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def tpserve(*words: str, status: int = 0) -> str:
    """What the command prints; stderr, where it fails."""
    done = subprocess.run([*TPSERVE, *words], capture_output=True, text=True, check=False, timeout=120, env=ENV)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("cli") / "demo", progress=False)
