"""What a client's script tells its runner: a line `client …`, and one a step, `done …` or `failed …`.

A step that fails does not keep the next ones from being tried.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator

URL = os.environ.get("TPSERVE_URL", "http://127.0.0.1:8080")
MODEL = os.environ.get("TPSERVE_MODEL", "demo")
KEY = os.environ.get("TPSERVE_KEY", "none")


class Step:
    """One thing that a client does; what it found may be added to its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def found(self, text: str) -> None:
        self.name += f" ({text})"


class Steps:
    """The steps of one client.

    Args:
        package: whose version is told; "": the script tells it itself.
    """

    def __init__(self, package: str, version: str = "") -> None:
        self._failed = False
        _tell("client", f"{package} {version or importlib.metadata.version(package)}")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Whatever is raised inside is told, and passed over."""
        step = Step(name)
        try:
            yield step
        except Exception as e:  # noqa: BLE001 — whatever a client makes of what it got is a result
            self._failed = True
            said = " ".join(str(e).split()) or repr(e)
            _tell("failed", f"{step.name}: {type(e).__name__}: {said[:400]}")
        else:
            _tell("done", step.name)

    def end(self) -> None:
        """Ends the process."""
        sys.exit(1 if self._failed else 0)


def _tell(kind: str, text: str) -> None:
    sys.stdout.write(f"{kind} {text}\n")
    sys.stdout.flush()
