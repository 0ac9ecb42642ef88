"""Where the clients are installed: below build/, beside the project's own environment, which they see.

The project's packages come after the clients' own: torch is not fetched again, and nothing of the project's is changed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "clients"
PYTHON = BUILD / "venv" / "bin" / "python"
NODE = BUILD / "node"


def install() -> None:
    """Makes what is not there, or was made of other lists of packages."""
    BUILD.mkdir(parents=True, exist_ok=True)
    _once(HERE / "requirements.txt", _install_python)
    if shutil.which("npm"):
        _once(HERE / "package.json", _install_node)


def _once(listed: Path, make: object) -> None:
    stamp = BUILD / f"{listed.name}.{hashlib.sha256(listed.read_bytes()).hexdigest()[:12]}"
    if not stamp.exists():
        assert callable(make)
        make()
        stamp.touch()


def _install_python() -> None:
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", BUILD / "venv"], check=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([PYTHON, "-c", asked], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    (Path(own) / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    # A pip of 2023 takes minutes over what today's finds out in seconds.
    subprocess.run([*pip, "-U", "pip"], check=True)
    before = _torch()
    subprocess.run([*pip, "--no-warn-script-location", "-r", HERE / "requirements.txt"], check=True)
    assert _torch() == before, f"a client brought a torch of its own: {_torch()}"


def _torch() -> str:
    found = subprocess.run(
        [PYTHON, "-c", "import torch; print(torch.__version__, torch.__file__)"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return found.stdout.strip()


def _install_node() -> None:
    NODE.mkdir(exist_ok=True)
    shutil.copy(HERE / "package.json", NODE / "package.json")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=NODE, check=True)
