"""The step loop."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A core, a channel and a frontend of a group that has been told to stop. In a process of its own: what is frozen and
# thawed in one that runs tests is collected at another time than pytest expects.
SCRIPT = """
import gc, sys
from types import SimpleNamespace
from tpserve.engine.config import EngineConfig
from tpserve.engine.loop import follow, lead
gc.disable()  # as a rank begins
ended, config = SimpleNamespace(stopped=True), EngineConfig(checkpoint_dir="none")
lead(ended, config, None, None) if sys.argv[1] == "lead" else follow(ended, config, None)
print(gc.get_freeze_count(), gc.isenabled())
"""


@pytest.mark.parametrize("role", ["lead", "follow"])
def test_a_rank_starts_with_a_heap_that_no_collection_walks(role: str) -> None:
    """A full round over what torch's import leaves takes 0.15 s, and is everybody's pause."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, role], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frozen, enabled = done.stdout.split()
    assert (int(frozen) > 10_000, enabled) == (True, "True")
