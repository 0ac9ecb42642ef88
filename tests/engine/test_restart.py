"""A rank group that dies, hangs or disagrees is replaced, and its requests go on where they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.helpers.faulty_worker import DEVICES, POISON
from tests.helpers.groups import with_
from tests.helpers.requests import Collected
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import EngineError
from tpserve.engine.process import descendants, is_running
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup

# Slow enough to be caught in the middle: about 80 steps, of which 20 are waited for.
LONG = {"max_new_tokens": 80, "ignore_eos": True, "temperature": 0.9}


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_streams_outlive_a_rank(tiny_config: EngineConfig) -> None:
    """And the group that stood by is the one that goes on."""
    client = EngineClient(with_(tiny_config, standby=True))
    try:
        client.start()
        expected = [Collected(client, [3 + i], **LONG, seed=i).wait() for i in range(3)]
        until(lambda: len(client.standby_pids) == 3)
        streams = [Collected(client, [3 + i], **LONG, seed=i) for i in range(3)]
        streams[0].wait_tokens(20)
        pids, standby = client.pids, client.standby_pids
        assert len(client.rank_pids) == 2
        os.kill(client.rank_pids[1], signal.SIGKILL)
        assert [stream.wait() for stream in streams] == expected
        assert client.num_restarts == 1
        assert client.pids == standby
        assert not [pid for pid in pids if is_running(pid)], "the dead group left processes behind"
        assert [r.num_blocks_in_use for r in client.status().ranks] == [0, 0]
        until(lambda: len(client.standby_pids) == 3)  # the next one
        pids = client.pids + client.standby_pids
    finally:
        client.close()
    assert not client.pids + client.standby_pids
    assert not [pid for pid in pids if is_running(pid)]


@pytest.mark.faults  # `make test` has tests/faults/test_ranks.py, with a rank that is stopped
def test_ranks_that_hang(tiny_config: EngineConfig) -> None:
    """Rank 0 in the middle of a stream; a follower while nobody asks for tokens. SIGKILL ends stopped ones, too."""
    client = EngineClient(with_(tiny_config, step_timeout_s=3.0))
    try:
        client.start()
        expected = Collected(client, [3], **LONG, seed=1).wait()
        stream = Collected(client, [3], **LONG, seed=1)
        stream.wait_tokens(20)
        pids = client.pids
        os.kill(client.rank_pids[0], signal.SIGSTOP)
        until(client.unhealthy_reason)
        assert stream.wait() == expected
        assert client.num_restarts == 1
        assert not [pid for pid in pids if is_running(pid)]

        until(lambda: client.unhealthy_reason() is None)
        pids = client.pids
        os.kill(client.rank_pids[1], signal.SIGSTOP)
        until(lambda: client.num_restarts == 2)
        assert not [pid for pid in pids if is_running(pid)]
        until(lambda: client.unhealthy_reason() is None)
    finally:
        client.close()


def test_a_poisonous_request_ends_and_the_others_go_on(
    tiny_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankGroup, "worker", "tests.helpers.faulty_worker")
    client = EngineClient(with_(tiny_config, max_restarts=2))
    try:
        client.start()
        expected = [Collected(client, [3 + i], **LONG, seed=i).wait() for i in range(2)]
        streams = [Collected(client, [3 + i], **LONG, seed=i) for i in range(2)]
        streams[1].wait_tokens(20)
        poisonous = Collected(client, [7, POISON], max_new_tokens=5)
        poisonous.wait(120)
        assert poisonous.finish_reason == "error"
        assert "in flight at 3 deaths of the rank group" in str(poisonous.error)
        assert [stream.wait(120) for stream in streams] == expected
        assert client.num_restarts == 3  # and none of them counts against the group
        assert Collected(client, [3], **LONG, seed=0).wait() == expected[0]
    finally:
        client.close()


def test_a_group_goes_on_with_fewer_ranks(
    tiny_config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = tmp_path / "devices"
    devices.write_text("2")
    monkeypatch.setenv(DEVICES, str(devices))
    monkeypatch.setattr(RankGroup, "worker", "tests.helpers.faulty_worker")
    client = EngineClient(with_(tiny_config, elastic=True, fused_kernels=False))
    try:
        assert client.start().tensor_parallel_size == 2
        stream = Collected(client, [3], **LONG, seed=1)
        stream.wait_tokens(20)
        devices.write_text("1")
        os.kill(client.rank_pids[0], signal.SIGKILL)
        assert len(stream.wait(120)) == LONG["max_new_tokens"]
        assert stream.finish_reason == "length"
        assert client.info.tensor_parallel_size == 1
        assert "tpserve:tensor_parallel_size 1.0" in client.metrics.text().decode()
    finally:
        client.close()


def test_a_group_that_keeps_dying_is_given_up(tiny_config: EngineConfig) -> None:
    client = EngineClient(msgspec.structs.replace(tiny_config, max_restarts=1))
    try:
        client.start()
        stream = Collected(client, [5], **(LONG | {"max_new_tokens": 240}))
        for _ in range(2):
            while not client.ready:
                time.sleep(0.05)
            for pid in client.pids:
                os.kill(pid, signal.SIGKILL)
            while client.ready:
                time.sleep(0.01)
        stream.wait()
        assert stream.finish_reason == "error"
        assert stream.error
        assert client.failure
        with pytest.raises(EngineError, match="given up"):
            client.submit("late", [5], SamplingParams(), print)
    finally:
        client.close()


def test_a_group_that_cannot_be_launched_is_given_up(
    tiny_config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 120)  # socket paths may have 107 characters
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    client = EngineClient(msgspec.structs.replace(tiny_config, max_restarts=1))
    with pytest.raises(EngineError, match="could not be launched"):
        client.start()
    assert client.num_restarts == 1
    assert not list(deep.iterdir())


def test_nothing_outlives_the_process_that_owns_the_client(tiny_config: EngineConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(tiny_config))
    code = (
        "import sys, time, msgspec\n"
        "from tpserve.engine.client import EngineClient\n"
        "from tpserve.engine.config import EngineConfig\n"
        "client = EngineClient(msgspec.json.decode(open(sys.argv[1], 'rb').read(), type=EngineConfig))\n"
        "client.start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(config)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        pids = descendants(owner.pid)
        assert len(pids) >= 3
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    deadline_s = time.monotonic() + 5
    while [pid for pid in pids if is_running(pid)] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]
