"""Fronts that die, and ports that are taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fronts import NAMES, SecondFront, TorchServe, demo, start, taken_port
from tests.faults.processes import MARK, marked
from tests.faults.streams import requests, undisturbed
from tests.faults.strikes import until
from tpserve.engine.errors import EngineError
from tpserve.engine.process import command_line, is_running

BODIES = requests(4)
GONE_S = 10.0  # two seconds, but for machines that are busy with something else


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with demo() as folder:
        yield folder


def gone(pids: list[int]) -> float:
    """Seconds until these processes have ended."""
    began_s = time.monotonic()
    until(lambda: not any(map(is_running, pids)), f"the end of {pids}", GONE_S)
    return time.monotonic() - began_s


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
def test_a_front_that_is_killed(checkpoint: Path, name: str) -> None:
    """TorchServe starts its backend again by itself; whoever started the second front does it here."""
    front = start(name, checkpoint)
    again: Any = front
    try:
        front.wait_until_ready()
        expected = undisturbed(front, BODIES)
        until(lambda: len(front.groups) == 2, "the standby group")
        owner, ranks = front.owner, [pid for group in front.groups for pid in group.pids]
        os.kill(owner, signal.SIGKILL)
        sys.stderr.write(f"{name}: the ranks were gone after {gone([owner, *ranks]):.2f} s\n")
        if name == "serve":
            until(lambda: not front.processes, f"the end of {front.processes}", GONE_S)
            again = start(name, checkpoint, port=front.port)
            again.wait_until_ready()
            assert again.port == front.port
        until(again.ready, "readiness")
        assert again.owner != owner
        assert undisturbed(again, BODIES) == expected
    finally:
        left = again.stop() + (front.stop() if again is not front else [])
    assert not left


@pytest.mark.faults
def test_a_torchserve_whose_java_is_killed(checkpoint: Path) -> None:
    front = TorchServe(checkpoint)
    try:
        front.wait_until_ready()
        until(lambda: len(front.groups) == 2, "the standby group")
        owner, ranks = front.owner, [pid for group in front.groups for pid in group.pids]
        (java,) = [pid for pid in front.processes if "org.pytorch.serve.ModelServer" in command_line(pid)]
        os.kill(java, signal.SIGKILL)
        gone([java, owner, *ranks])
    finally:
        left = front.stop()
    assert not left


def test_a_port_in_use(checkpoint: Path) -> None:
    with taken_port() as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "tpserve.cli.main", "serve", "--checkpoint", str(checkpoint), "--tp", "2"]
        env = {**os.environ, MARK: "port-in-use"}
        done = subprocess.run(
            [*command, "--port", str(port)], capture_output=True, text=True, timeout=120, check=False, env=env
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")
    assert "Traceback" not in done.stderr
    assert not marked("port-in-use")


@pytest.mark.faults
def test_a_port_in_use_below_torchserve(checkpoint: Path) -> None:
    with taken_port() as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        front = TorchServe(checkpoint, properties={"inference_address": address})
        try:
            with pytest.raises(EngineError, match=r"(?s)did not come up.*Address already in use"):
                front.wait_until_ready()
            assert not front.processes
        finally:
            left = front.stop()
    assert not left


@pytest.mark.faults
def test_a_second_front_on_the_port_of_another(checkpoint: Path) -> None:
    """The first one does not notice."""
    front = SecondFront(checkpoint, 2, standby=False)
    try:
        front.wait_until_ready()
        second = SecondFront(checkpoint, 2, port=front.port)
        assert second.served.process.wait(120) == 2
        assert "cannot listen" in second.log.read_text()
        assert not second.stop()
        assert front.ready()
        assert undisturbed(front, BODIES[:1])
    finally:
        left = front.stop()
    assert not left
