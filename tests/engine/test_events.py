"""Events on their way to rank 0."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tpserve.engine import supervisor
from tpserve.engine.config import EngineConfig
from tpserve.engine.protocol import Add, Cancel, Event
from tpserve.engine.sampling_params import SamplingParams
from tpserve.engine.supervisor import RankGroup
from tpserve.engine.worker import ClientSocket


class Slow:
    """An encoder whose user is in no hurry."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def encode(self, event: Event) -> bytes:
        time.sleep(0.05)
        encoded: bytes = self._encoder.encode(event)
        return encoded


def test_what_is_sent_together_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle rank 0 takes in what is there and begins: it must not find half of it."""
    monkeypatch.setattr(supervisor, "_command", lambda *_: ["sleep", "60"])
    group = RankGroup(EngineConfig(checkpoint_dir="nowhere"))
    rank_0 = ClientSocket(group.folder)
    assert group.receive(0.0) == []  # takes the connection
    try:
        group._encoder = Slow(group._encoder)  # type: ignore[assignment]
        sent: list[Event] = [*(Add(str(i), [3 + i], SamplingParams()) for i in range(4)), Cancel("2")]
        group.send()
        group.send(*sent)
        assert rank_0.receive(5.0) == sent
        group.send(sent[0])
        assert rank_0.receive(5.0) == sent[:1]
        assert rank_0.receive(0.0) == []
    finally:
        group.kill()
        rank_0.close()
