"""`make audit`: asks PyPI's advisory database about every package of an environment, through pip-audit.

pip-audit lives in an environment of its own (build/audit), so that what it needs is not audited as if it were ours.
Exit status: 0 nothing is known; 1 something is; 2 the database could not be asked, so nothing is known at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IGNORED = ROOT / "scripts" / "audit-ignored.txt"
_HOME = ROOT / "build" / "audit"
_LIST = """
import importlib.metadata as m
for d in m.distributions():
    print(d.metadata["Name"] + "==" + d.version.partition("+")[0])  # +cpu is a build that no database knows
"""


def read_ignored(text: str) -> dict[str, str]:
    """Advisories that do not concern us, with the reason.

    Args:
        text: `ID reason` a line; empty lines and those that begin with # are passed over.

    Raises:
        ValueError: one has no reason.
    """
    ignored: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise ValueError(f"{IGNORED.name}: {name} has no reason")
            ignored[name] = reason.strip()
    return ignored


def judge(report: dict[str, Any], ignored: dict[str, str]) -> tuple[list[str], int]:
    """What to print about pip-audit's JSON, and the exit status."""
    audited = [package for package in report["dependencies"] if "skip_reason" not in package]
    skipped = [package["name"] for package in report["dependencies"] if "skip_reason" in package]
    if not audited:
        return [f"nothing was audited: the database knows none of {len(skipped)} packages; is it a mirror?"], 2
    lines: list[str] = []
    used: set[str] = set()
    found = 0
    for package in audited:
        for advisory in package["vulns"]:
            known = next((name for name in (advisory["id"], *advisory["aliases"]) if name in ignored), None)
            what = f"{package['name']} {package['version']}: {', '.join([advisory['id'], *advisory['aliases']])}"
            if known is not None:
                used.add(known)
                lines.append(f"ignored  {what}: {ignored[known]}")
                continue
            found += 1
            remedy = f"fixed in {', '.join(advisory['fix_versions'])}" if advisory["fix_versions"] else "no fix yet"
            lines.append(f"FOUND    {what}; {remedy}")
    lines += [f"unused   {name} of {IGNORED.name} is not found any more" for name in ignored if name not in used]
    if skipped:
        lines.append(f"skipped  not in the database: {', '.join(skipped)}")
    lines.append(f"{len(audited)} packages audited, {found} advisories that are not ignored")
    return lines, 1 if found else 0


def main(python: str, service: str = "pypi") -> int:
    """Audits the environment of an interpreter.

    Args:
        python: the interpreter.
        service: "pypi" or "osv".
    """
    tool = _HOME / "bin" / "pip-audit"
    if not tool.exists():
        subprocess.run([python, "-m", "venv", str(_HOME)], check=True)
        install = [str(_HOME / "bin" / "python"), "-m", "pip", "install", "-q", "pip-audit>=2.9"]
        if subprocess.run(install, check=False).returncode:
            sys.stderr.write("pip-audit could not be installed; is there a network?\n")
            return 2
    listed = subprocess.run([python, "-c", _LIST], capture_output=True, text=True, check=True).stdout
    own = ("tpserve==", "pip-audit==")
    packages = sorted({line for line in listed.splitlines() if not line.startswith(own)}, key=str.lower)
    requirements = _HOME / "installed.txt"
    requirements.write_text("\n".join(packages) + "\n")
    command = [str(tool), "-r", str(requirements), "--no-deps", "--disable-pip", "-f", "json", "-s", service,
               "--progress-spinner", "off", "--timeout", "20"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"status {done.returncode}")
        sys.stderr.write(f"nothing was audited: the database ({service}) did not answer: {reason[:300]}\n")
        return 2
    lines, status = judge(report, read_ignored(IGNORED.read_text(encoding="utf-8")))
    sys.stdout.write("\n".join(lines) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
