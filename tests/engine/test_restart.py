"""A rank group that dies, hangs or disagrees is replaced, and its requests go on where they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.helpers.requests import Collected
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import EngineError
from tpserve.engine.process import descendants, is_running
from tpserve.engine.sampling_params import SamplingParams

# Slow enough to be caught in the middle: about 200 steps.
LONG = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 0.9}


@pytest.mark.parametrize(("sig", "victim"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)], ids=["killed", "hung"])
def test_streams_outlive_a_rank(tiny_config: EngineConfig, sig: signal.Signals, victim: int) -> None:
    config = msgspec.structs.replace(tiny_config, step_timeout_s=3.0)
    client = EngineClient(config)
    try:
        client.start()
        expected = [Collected(client, [3 + i], **LONG, seed=i).wait() for i in range(3)]
        streams = [Collected(client, [3 + i], **LONG, seed=i) for i in range(3)]
        streams[0].wait_tokens(20)
        pids = client.pids
        ranks = [pid for pid in pids if b"tpserve.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        ranks = [pid for pid in ranks if b"tpserve.engine.launch" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(ranks[victim], sig)
        assert [stream.wait() for stream in streams] == expected
        assert client.num_restarts == 1
        assert not [pid for pid in pids if is_running(pid)], "the dead group left processes behind"
        assert [r.num_blocks_in_use for r in client.status().ranks] == [0, 0]
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
