"""`tpserve demo`: from the bundled Fairscale shards to a streamed answer, in one command."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpserve.convert.convert import convert
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.handler.archive import archive
from tpserve.handler.server_process import TorchServeProcess

_OPENINGS = (
    "Once upon a time", "There was a king who", "In a deep forest", "The old woman said",
    "One morning the prince", "A poor miller", "The wolf came", "Long ago a fisherman",
)  # fmt: skip


def run(tensor_parallel_size: int, checkpoint: str | None) -> None:
    """Shows everything and cleans up.

    Raises:
        ConfigError: the checkpoint is not there.
        EngineError: the server did not come up, an answer was wrong, or a process outlived it.
    """
    source = Path(checkpoint) if checkpoint else Path(__file__).resolve().parents[1] / "model_store" / "demo"
    if not (source / "params.json").is_file():
        raise ConfigError(f"{source} holds no checkpoint; from a clone of the repository, run: make demo")
    with tempfile.TemporaryDirectory(prefix="tpserve-demo-") as folder:
        work = Path(folder)
        say(f"converting {len(list(source.glob('consolidated.*.pth')))} Fairscale shards")
        converted = convert(source, work / "converted")
        made = archive(converted, export_path=work / "store", tensor_parallel_size=tensor_parallel_size)
        say(f"starting TorchServe with {made.path.name} at tensor-parallel size {tensor_parallel_size}")
        started_s = time.monotonic()
        server = TorchServeProcess(work / "store", [made.models])
        url = f"{server.address}/predictions/{server.models[0]}"
        try:
            server.wait_until_ready()
            say(f"ready after {time.monotonic() - started_s:.1f} s: {len(server.pids)} processes")
            _story(url)
            _chat(url)
            _batch(url)
        finally:
            outlived = server.stop()
            server.remove()
        if outlived:
            raise EngineError(f"processes outlived TorchServe: {outlived}")
        say("stopped; no process is left")


def _story(url: str) -> None:
    body = {"prompt": _OPENINGS[0], "max_new_tokens": 120, "temperature": 0.7, "seed": 7}
    say("a story, token by token:", f"curl -N {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    print(body["prompt"], end="", flush=True)
    told = False
    last: dict[str, Any] = {}
    for last in _stream(url, body):
        # An answer's text starts without the space that parted it from the prompt.
        begins_a_word = not told and last["text"][:1].isalnum()
        print(" " * begins_a_word + last["text"], end="", flush=True)
        told = True
    print()
    if "usage" not in last:
        raise EngineError(f"the stream ended early: {last}")
    print(f"  ({last['usage']['completion_tokens']} tokens, finish_reason {last['finish_reason']})")


def _chat(url: str) -> None:
    dialog = [
        {"role": "system", "content": "You tell fairy tales."},
        {"role": "user", "content": "Tell me a story about a king."},
    ]
    body = {"dialog": dialog, "mode": "chat", "max_new_tokens": 100, "stream": False, "temperature": 0.7, "seed": 5}
    say("a chat, in one piece:", f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    for message in dialog:
        print(f"  {message['role']}: {message['content']}")
    answer = json.loads(_curl(url, body))
    if "text" not in answer:
        raise EngineError(f"the chat was refused: {answer}")
    print(f"  assistant: {answer['text'].strip()}")


def _batch(url: str) -> None:
    say("eight requests, each joining while the others run:")
    started_s = time.monotonic()
    rows: list[tuple[float, float, dict[str, Any]] | None] = [None] * len(_OPENINGS)

    def ask(i: int) -> None:
        body = {"prompt": _OPENINGS[i], "max_new_tokens": 40 + 10 * (i % 4), "temperature": 0.7, "seed": i}
        begun_s = time.monotonic() - started_s
        lines = list(_stream(url, body))
        text = "".join(line["text"] for line in lines)
        rows[i] = (begun_s, time.monotonic() - started_s, {**lines[-1], "text": text})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(_OPENINGS))]
    for thread in threads:
        thread.start()
        time.sleep(0.15)
    for thread in threads:
        thread.join()
    done = [row for row in rows if row is not None and "usage" in row[2]]
    for opening, (begun_s, ended_s, result) in zip(_OPENINGS, done, strict=False):
        n = result["usage"]["completion_tokens"]
        text = f"{opening} | {result['text'][:60]}…".replace("\n", " ")
        print(f"  {begun_s:5.2f} s → {ended_s:5.2f} s  {n:3d} tokens  {text}")
    if len(done) < len(_OPENINGS):
        raise EngineError(f"only {len(done)} of {len(_OPENINGS)} requests were answered")
    overlapping = sum(b[0] < a[1] for a, b in itertools.pairwise(done))
    print(f"  {overlapping} of {len(done) - 1} joined before the one ahead of them had ended")


def _stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The NDJSON lines of a streamed answer, as curl prints them."""
    process = subprocess.Popen(curl_command(url, body), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            yield json.loads(line)
    if process.wait() != 0:
        raise EngineError(f"curl ended with status {process.returncode}")


def _curl(url: str, body: dict[str, Any]) -> str:
    return subprocess.run(curl_command(url, body), stdout=subprocess.PIPE, text=True, check=True).stdout


def curl_command(url: str, body: dict[str, Any]) -> list[str]:
    """What posts `body`, and prints the answer as it comes."""
    return ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]


def say(*lines: str) -> None:
    """Prints a heading; further lines are commands that are about to run."""
    print("", file=sys.stdout)
    for number, line in enumerate(lines):
        print(("• " if number == 0 else "  $ ") + line, flush=True)
