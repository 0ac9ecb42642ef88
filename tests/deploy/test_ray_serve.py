"""`deploy/ray_serve.py` with two groups on this machine: the contract of the fronts, and what a group's death costs.

Ray is no dependency of ours: `make test-ray` installs it into an environment of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.contract import *  # noqa: F403
from tests.helpers.contract import Address
from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.text.models import load, tiny_model
from tpserve.convert.convert import convert
from tpserve.engine.ports import hold_port

ROOT = Path(__file__).resolve().parents[2]
GROUP = "ray::ServeReplica:tpserve:Group"
ANSWER = {"prompt": "once upon a time", "max_new_tokens": 700, "ignore_eos": True, "temperature": 1.0}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: make test-ray"),
    pytest.mark.slow,
]


@dataclasses.dataclass
class Cluster:
    """One running `deploy/ray_serve.py`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def groups(self) -> list[psutil.Process]:
        """The actors of the groups."""
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            return [p for p in below if name_of(p).startswith(GROUP)]
        return []


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="tps-") as name, hold_port() as held:  # short: sockets live below it
        folder = Path(name)
        rows = -(-load(tiny_model()).vocab_size // 8) * 8
        write_fairscale_checkpoint(folder / "shards", {**TINY_PARAMS, "vocab_size": rows}, mp=2)
        tiny = convert(folder / "shards", folder / "tiny", tokenizer_path=tiny_model(), progress=False)
        port = held.getsockname()[1]
        command = [sys.executable, str(ROOT / "deploy" / "ray_serve.py"), f"checkpoint={tiny}", f"port={port}"]
        command += ["min_replicas=2", "device=cpu", "standby=false", "max_seq_len=1024", "num_cpus=4", "api_key=k"]
        env = {**os.environ, "HOME": name, "RAY_TMPDIR": name, "RAY_USAGE_STATS_ENABLED": "0"}
        log = folder / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("serving ")), "")
            assert line, log.read_text()[-6000:]
            yield Cluster(process, f"http://127.0.0.1:{port}", log)
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            _, left = psutil.wait_procs([*below], timeout=10)
            names = [name_of(one) for one in left]
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        assert not names, names


@pytest.fixture
def address(cluster: Cluster) -> Address:
    return Address(cluster.url, "tiny", cluster.log, "k", "predictions/tiny")


def two_groups(cluster: Cluster) -> list[psutil.Process]:
    deadline_s = time.monotonic() + 90
    while True:
        groups = cluster.groups()
        ready = [g for g in groups if len(g.children(recursive=True)) >= 2]  # torchrun and its rank
        if len(ready) == 2:
            return ready
        assert time.monotonic() < deadline_s, groups
        time.sleep(0.2)


def busy_s(group: psutil.Process) -> float:
    """Processor time of its ranks."""
    ranks = [p for p in group.children(recursive=True) if "-u -m tpserve.engine.rank" in name_of(p)]
    return sum(rank.cpu_times().user for rank in ranks)


def whole(address: Address, seed: int) -> dict[str, Any]:
    status, _, body = address.ask("predictions/tiny", {**ANSWER, "seed": seed, "stream": False})
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def streamed(address: Address, seed: int, begun: threading.Semaphore | None = None) -> list[dict[str, Any]]:
    """The lines of a stream; `begun` is told of the first."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {address.key}"}
    body = json.dumps({**ANSWER, "seed": seed}).encode()
    asked = urllib.request.Request(f"{address.url}/predictions/tiny", body, headers)
    with urllib.request.urlopen(asked, timeout=90) as response:
        lines = [json.loads(response.readline())]
        if begun is not None:
            begun.release()
        return lines + [json.loads(line) for line in response]


def test_answers_that_have_not_begun_survive_the_death_of_their_group(cluster: Cluster, address: Address) -> None:
    """And a stream that has begun ends with an error that says so: it is never cut off as if it were whole."""
    groups = two_groups(cluster)
    before = [whole(address, seed)["ids"] for seed in range(3)]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(whole, address, seed % 3) for seed in range(12)]
        streams = [pool.submit(streamed, address, seed % 3, begun) for seed in range(12)]
        idle_s = [busy_s(group) for group in groups]
        for _ in streams:
            assert begun.acquire(timeout=60)
        # Ray may have given all of them to one group.
        worked_s = [busy_s(group) - before_s for group, before_s in zip(groups, idle_s, strict=True)]
        victim, other = groups if worked_s[0] > worked_s[1] else groups[::-1]
        assert not any(one.done() for one in [*answers, *streams]), "too fast for this test: raise max_new_tokens"
        victim.send_signal(signal.SIGKILL)
        after = [one.result()["ids"] for one in answers]
        lines = [one.result() for one in streams]
    assert after == [before[seed % 3] for seed in range(12)]
    broken = [found for found in lines if "error" in found[-1]]
    assert broken
    for seed, found in enumerate(lines):
        ids = [i for line in found for i in line.get("ids", [])]
        assert ids == before[seed % 3][: len(ids)]
        if found in broken:
            assert found[-1]["finish_reason"] == "error"
            assert "died" in found[-1]["error"]["message"]
        else:
            assert ids == before[seed % 3]
    assert {one.pid for one in two_groups(cluster)} >= {other.pid}, "Ray has made another one"
    assert whole(address, 0)["ids"] == before[0]


def test_a_rank_that_dies_is_its_engines_affair(cluster: Cluster, address: Address) -> None:
    groups = two_groups(cluster)
    before = whole(address, 5)["ids"]
    with ThreadPoolExecutor(4) as pool:
        begun = threading.Semaphore(0)
        streams = [pool.submit(streamed, address, 5, begun) for _ in range(4)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        for group in groups:
            (rank,) = (p for p in group.children(recursive=True) if "-u -m tpserve.engine.rank" in name_of(p))
            rank.kill()
        for one in streams:
            assert [i for line in one.result() for i in line["ids"]] == before
    assert {one.pid for one in two_groups(cluster)} == {one.pid for one in groups}


def test_a_body_that_is_too_large_goes_no_further(address: Address) -> None:
    status, _, body = address.ask("v1/completions", b"x" * ((2 << 20) + 1))
    assert (status, json.loads(body)["error"]["code"]) == (413, 413)


def test_running_answers_end_before_the_server_does(cluster: Cluster, address: Address) -> None:
    """Last in this file: the server does not come back."""
    before = whole(address, 9)["ids"]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(streamed, address, 9, begun)
        assert begun.acquire(timeout=60)
        cluster.process.terminate()
        lines = stream.result()
    assert [i for line in lines for i in line["ids"]] == before
    assert lines[-1]["usage"]["completion_tokens"] == len(before)
    assert cluster.process.wait(60) == 0
