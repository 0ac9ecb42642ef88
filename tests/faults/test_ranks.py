"""Ranks that die and hang below both fronts: clients see a pause, and every token once.

By default a few faults, one server a front; `make test-faults` runs them all.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fronts import NAMES, Front, demo, start
from tests.faults.streams import Clients, Told, ask, long_prompt, requests, undisturbed
from tests.faults.strikes import KINDS, readiness, strike, until

BODIES = [body | {"max_new_tokens": min(80, body["max_new_tokens"])} for body in requests(12)]
BY_DEFAULT = ("kill rank 0", "stop rank 1")
# Small steps, so that a prompt takes many of them.
OPTIONS = {"max_num_batched_tokens": 32, "step_timeout_s": 4.0}
STREAM: dict[str, Any] = {"prompt": "Once upon a time", "max_new_tokens": 200, "ignore_eos": True, "seed": 3,
                          "temperature": 0.9}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Running:
    """A server, and what it says of `BODIES` while nothing happens to it."""

    front: Front
    expected: list[Told]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with demo() as folder:
        yield folder


@pytest.fixture(scope="module", params=NAMES)
def running(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Running]:
    front = start(request.param, checkpoint, **OPTIONS)
    try:
        front.wait_until_ready()
        yield Running(front, undisturbed(front, BODIES, 12))
    finally:
        left = front.stop()
    assert not left, f"outlived the server: {left}"


@pytest.fixture(autouse=True)
def _nothing_is_left(running: Running) -> Iterator[None]:
    yield
    front = running.front
    until(front.ready, "readiness")
    until(lambda: set(front.blocks_in_use()) == {0}, "blocks to be given back", 30)
    until(lambda: not front.orphans, "an end of what nobody started", 10)


def kinds() -> list[Any]:
    return [kind if kind in BY_DEFAULT else pytest.param(kind, marks=pytest.mark.faults) for kind in KINDS]


@pytest.mark.parametrize("kind", kinds())
def test_clients_see_a_pause(running: Running, kind: str) -> None:
    front = running.front
    clients = Clients(front, BODIES, running.expected, 6)
    group, began_s = front.serving, clients.last_token_s
    with readiness(front) as asking:
        until(lambda: clients.last_token_s > began_s, "tokens")
        outcome = strike(front, kind, asking, lambda: clients.last_token_s)
    assert clients.stop() == 0, "clients hang"
    assert not clients.wrong
    assert clients.completions >= 6
    assert not outcome.left
    if kind == "kill the standby":
        assert front.serving == group
    else:
        assert outcome.unready_s is not None, outcome
        assert outcome.unready_s < 10, outcome  # two seconds, but for machines that are busy with something else


def during_prefill(front: Front) -> tuple[dict[str, Any], Told]:
    """Kills rank 1 after a long prompt was sent and before its first token; what was asked, and told."""
    for seed in range(10):
        body = STREAM | {"seed": seed, "max_new_tokens": 30} | long_prompt(1000 + seed)
        group, begun = front.serving, threading.Event()
        assert group is not None
        told: list[Told] = []
        asking = threading.Thread(target=lambda: told.append(ask(front, body, lambda line: begun.set())))  # noqa: B023
        asking.start()
        until(lambda: begun.is_set() or max(front.blocks_in_use()) > 4, "blocks of the prompt")  # noqa: B023
        too_late = begun.is_set()
        os.kill(group.ranks[1], signal.SIGKILL)
        asking.join(120)
        assert told, "no answer"
        until(front.ready, "readiness")
        if not too_late:
            return body, told[0]
    raise AssertionError("no prompt took long enough")


def during_streaming(front: Front) -> tuple[dict[str, Any], Told]:
    """Kills rank 1 in the middle of a stream."""
    group = front.serving
    assert group is not None
    lines: list[Any] = []

    def count(line: Any) -> None:
        lines.append(line)
        if len(lines) == 10:
            os.kill(group.ranks[1], signal.SIGKILL)

    told = ask(front, STREAM, count)
    assert len(lines) > 10
    return STREAM, told


@pytest.mark.parametrize("when", [during_prefill, pytest.param(during_streaming, marks=pytest.mark.faults)])
def test_one_request_alone(running: Running, when: Any) -> None:
    """Nobody else keeps the group busy, and after the prompt's death it is the only suspect."""
    body, told = when(running.front)
    until(lambda: running.front.serving, "the next group")
    assert told == ask(running.front, body)
