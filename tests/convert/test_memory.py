"""No conversion, and no load, of any form holds more than a few blocks of the checkpoint in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers.data import ROOT

LIMIT_MIB = 32


def test_every_pair_of_forms_stays_in_bounds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.convert.memory_pairs", str(tmp_path), "0.06"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["peaks_mib"]) == 6 * 5 + 2
    assert found["checkpoint_mib"] > 2 * LIMIT_MIB, "a whole checkpoint in memory must be too much"
    beyond = {pair: round(mib) for pair, mib in found["peaks_mib"].items() if mib > LIMIT_MIB}
    assert not beyond, beyond
