"""Servers that a measurement starts, waits for and stops. Free of torch."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tpserve.engine.errors import ConfigError
from tpserve.engine.ports import hold_port
from tpserve.engine.process import descendants, is_running, kill_all

_STOP_S = 30.0


def split_command(command: str) -> tuple[dict[str, str], list[str]]:
    """ "A=1 vllm serve X" as variables and words; there is no shell.

    Raises:
        ConfigError: no program is named.
    """
    words = shlex.split(command)
    variables = {}
    while words and words[0].partition("=")[0].isidentifier() and "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    if not words:
        raise ConfigError(f"{command!r} names no program")
    return variables, words


@contextlib.contextmanager
def running(command: str, api_key: str = "", ready_s: float = 600.0) -> Iterator[str]:
    """A server's URL, from when it lists its models until the block ends; then it and its processes are gone.

    Args:
        command: `{port}` in it stands for a free port on which it is to listen; a URL: a server that runs already.
        api_key: that it asks for.
        ready_s: so long may it take to come up.

    Raises:
        ConfigError: it cannot be started, ended, or did not come up in time; the message ends with what it printed.
    """
    if command.startswith(("http://", "https://")):
        yield command
        return
    if "{port}" not in command:
        raise ConfigError(f"{command!r} must say where to listen: --port {{port}}")
    with hold_port() as holding, tempfile.TemporaryDirectory(prefix="tpserve-bench-") as folder:
        port = holding.getsockname()[1]
        variables, words = split_command(command.replace("{port}", str(port)))
        log = Path(folder) / "log"
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **variables}
                )
            except OSError as e:
                raise ConfigError(f"{words[0]}: {e}") from None
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url, api_key, ready_s, log)
            yield url
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, api_key: str, ready_s: float, log: Path) -> None:
    deadline_s = time.monotonic() + ready_s
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    while process.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, urllib.error.URLError):
            request = urllib.request.Request(f"{url}/v1/models", headers=headers)
            with urllib.request.urlopen(request, timeout=10) as response:
                if response.status == 200:
                    return
        time.sleep(0.1)
    state = "did not come up" if process.poll() is None else f"ended with status {process.returncode}"
    raise ConfigError(f"{process.args!r} {state}; it printed last:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    pids = [process.pid, *descendants(process.pid)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    kill_all([pid for pid in pids if is_running(pid)])
    process.wait()
