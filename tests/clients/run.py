"""`make test-clients`: installs the clients, starts both fronts, lets each client ask, and writes docs/clients.md.

With names of clients (`make test-clients CLIENTS="openai page"`) only those run, and the other rows stay.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.clients import environment, fronts, table

_HERE = Path(__file__).resolve().parent
# The script, and the most seconds it may take on two busy cores.
_CLIENTS = {
    "openai": ("client_openai.mjs", 120),
    "ai_sdk": ("client_ai_sdk.mjs", 120),
    "langchain": ("client_langchain.py", 180),
    "litellm": ("client_litellm.py", 180),
    "triton": ("client_triton.py", 60),
    "lm_eval": ("client_lm_eval.py", 300),
    "guidellm": ("client_guidellm.py", 180),
    "schemathesis": ("client_schemathesis.py", 300),
    "page": ("page.py", 240),
}
_ONLY_SECOND_FRONT = {"page"}


def main(names: Sequence[str]) -> int:
    """Returns the exit code: 1 if anything failed."""
    unknown = set(names) - set(_CLIENTS)
    if unknown:
        sys.exit(f"no such clients: {', '.join(sorted(unknown))}; known: {', '.join(_CLIENTS)}")
    environment.install()
    told: list[table.Told] = []
    with fronts.converted() as checkpoint:
        for start in (fronts.second_front, fronts.torchserve):
            log = environment.BUILD / f"{start.__name__}.log"
            with start(checkpoint, log) as front:
                for name in names or _CLIENTS:
                    if name not in _ONLY_SECOND_FRONT or start is fronts.second_front:
                        told.append(_run(name, front))
                        sys.stdout.write(told[-1].row + "\n")
                        sys.stdout.flush()
            if "Traceback" in log.read_text(errors="replace"):
                told.append(table.Told("the server's log", "", front.name, [], [f"a traceback: {log}"], 0.0))
    table.write(told, os.cpu_count() or 1, keep=bool(names))
    return int(any(one.failed for one in told))


def _run(name: str, front: fronts.Front) -> table.Told:
    script, limit_s = _CLIENTS[name]
    interpreter = shutil.which("node") if script.endswith(".mjs") else str(environment.PYTHON)
    if interpreter is None:
        return table.Told(name, "", front.name, [], ["there is no node"], 0.0)
    env = {
        **os.environ,
        "TPSERVE_URL": front.url,
        "TPSERVE_MODEL": front.model,
        "TPSERVE_KEY": front.key,
        "TPSERVE_NODE": str(environment.NODE),
        "PYTHONPATH": str(environment.ROOT),
        "DO_NOT_TRACK": "1",
    }
    started_s = time.monotonic()
    trouble = None
    with (environment.BUILD / f"{name}-{front.name.split()[0]}.log").open("w+") as log:
        # A session of its own: what it starts, browsers too, ends with it.
        process = subprocess.Popen(
            [interpreter, _HERE / script],
            env=env,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            trouble = f"not done after {limit_s} s"
        if process.returncode and trouble is None and "failed " not in output:
            log.seek(0)
            trouble = f"ended with {process.returncode}: {' '.join(log.read()[-300:].split())}"
    return table.Told.of(name, front.name, output, trouble, time.monotonic() - started_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
