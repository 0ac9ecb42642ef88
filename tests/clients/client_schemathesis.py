"""Schemathesis: bodies made of the served openapi.json, good and bad, with all of its checks."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.steps import KEY, URL, Steps


def main() -> None:
    steps = Steps("schemathesis")
    with steps.step("all checks over openapi.json") as step, tempfile.TemporaryDirectory() as folder:
        command = [
            Path(sys.executable).parent / "schemathesis",
            "--config-file", Path(__file__).with_suffix("").with_name("schemathesis.toml"),
            "run", f"{URL}/openapi.json", "--url", URL, "--header", f"Authorization: Bearer {KEY}",
            "--checks", "all", "--max-examples", "40", "--max-time", "90", "--workers", "1", "--seed", "1",
            "--continue-on-failure", "--no-color", "--generation-database", "none",
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        sys.stderr.write("".join(f"{line[:300]}\n" for line in (ran.stdout + ran.stderr).splitlines()))
        summary = ran.stdout.partition("= SUMMARY =")[2]
        cases = re.search(r"Test cases:\s*(.*)", summary)
        step.found(cases[1] if cases else "no summary")
        kinds = "; ".join(re.findall(r"❌ (ST.*|.*: \d+)$", summary, re.MULTILINE))
        assert ran.returncode == 0, kinds or (ran.stdout + ran.stderr)[-400:]
    steps.end()


main()
