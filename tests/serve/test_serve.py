"""`tpserve serve` with a real engine: streams, clients that go, drains, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.conftest import KEY
from tests.serve.process import LONG, PREDICT, Served

Start = Callable[..., Served]
ROOMY = ("--max_seq_len", "20000", "--num_kv_blocks", "1300")  # for answers of half a minute


def test_a_stream_is_told_line_by_line_while_it_runs(served: Served) -> None:
    arrivals: list[float] = []
    lines = []
    with served.request("POST", PREDICT, LONG, KEY) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        while line := response.readline():
            lines.append(json.loads(line))
            arrivals.append(time.monotonic())
    assert len(lines) > 20
    assert arrivals[-1] - arrivals[0] > 0.1
    assert sum(len(line["ids"]) for line in lines) == LONG["max_new_tokens"]
    status, whole = served.ask("POST", PREDICT + "/1.0", {**LONG, "stream": False}, KEY)
    assert status == 200
    assert json.loads(whole)["text"] == "".join(line["text"] for line in lines)


def test_many_streams_at_once(served: Served) -> None:
    def ask(i: int) -> list[int]:
        status, body = served.ask("POST", PREDICT, {**LONG, "max_new_tokens": 20 + i, "seed": i}, KEY)
        assert status == 200
        return [token for line in body.splitlines() for token in json.loads(line)["ids"]]

    with ThreadPoolExecutor(24) as pool:
        assert [len(ids) for ids in pool.map(ask, range(24))] == [20 + i for i in range(24)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_blocks(served: Served, stream: bool) -> None:
    body = json.dumps({**LONG, "max_new_tokens": 1000, "stream": stream})
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer 1e5\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall((head + body).encode())
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        else:
            time.sleep(0.3)
        assert min(served.blocks_in_use(KEY)) > 0
    left_s = time.monotonic()
    # The whole answer would take several seconds.
    while max(served.blocks_in_use(KEY)):
        assert time.monotonic() - left_s < 2
    last = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    assert 499 in [line["status"] for line in last]


def test_keys_arrive_as_they_were_typed(served: Served) -> None:
    for key, status in (("1e5", 200), ("[x]", 200), ("from-env", 200), ("100000.0", 401), ("x", 401)):
        assert served.ask("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})[0] == status
    for path in ("/", "/health", "/health/ready", "/health/live"):
        assert served.ask("GET", path)[0] == 200
    assert "from-env" not in served.log.read_text()


def test_the_front_has_no_torch(served: Served) -> None:
    front, *others = (Path(f"/proc/{pid}/maps").read_text() for pid in served.pids)
    assert "libtorch" not in front
    assert "libtorch" in "".join(others)


def test_sigterm_lets_streams_end_for_a_time(start: Start) -> None:
    served = start("--drain_timeout_s", "3", *ROOMY)
    served.wait_until_ready()
    length, endless = 100, {**LONG, "max_new_tokens": 15000}
    with ThreadPoolExecutor() as pool, served.request("POST", PREDICT, endless) as endless_response:
        assert endless_response.readline()
        whole = pool.submit(served.ask, "POST", PREDICT, {**endless, "stream": False})
        with served.request("POST", PREDICT, {**LONG, "max_new_tokens": length}) as response:
            lines = [response.readline()]
            served.signal(signal.SIGTERM)
            time.sleep(0.1)
            assert served.ask("GET", "/health")[0] == 503
            assert served.ask("POST", PREDICT, LONG)[0] == 503
            lines += response.readlines()
        cut_off = endless_response.readlines()
        assert whole.result()[0] == 503
    assert json.loads(lines[-1])["finish_reason"] == "length"
    assert sum(len(json.loads(line)["ids"]) for line in lines) == length
    last = json.loads(cut_off[-1])
    assert (last["finish_reason"], last["error"]["message"]) == ("error", "the server is shutting down")
    assert served.wait() == 0
    assert "Traceback" not in served.log.read_text()


def test_a_second_signal_does_not_wait(start: Start) -> None:
    served = start(*ROOMY)
    served.wait_until_ready()
    with served.request("POST", PREDICT, {**LONG, "max_new_tokens": 15000}) as response:
        assert response.readline()
        served.signal(signal.SIGTERM)
        time.sleep(0.3)
        assert served.process.poll() is None
        signalled_s = time.monotonic()
        served.signal(signal.SIGTERM)
        assert served.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - signalled_s < 5


def test_an_engine_that_has_given_up_ends_the_process(start: Start) -> None:
    served = start("--max_restarts", "0", *ROOMY)
    served.wait_until_ready()
    with served.request("POST", PREDICT, {**LONG, "max_new_tokens": 15000}) as response:
        lines = [response.readline()]
        os.kill(served.pids[-1], signal.SIGKILL)  # a rank
        lines += response.readlines()
    assert json.loads(lines[-1])["finish_reason"] == "error"
    assert served.wait() == 2
    assert "error: the engine has given up: the rank group ended" in served.log.read_text()


def test_what_cannot_be_served_is_an_error_at_once(checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        (["--checkpoint", str(checkpoint), "--max_seq_length", "5"], "did you mean 'max_seq_len'"),
        (["--checkpoint", str(tmp_path)], "error: "),
    ):
        command = [sys.executable, "-m", "tpserve.cli.main", "serve", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
