"""The wire between processes: everything round-trips, and garbage is an error, never an object of another kind."""

from __future__ import annotations

import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpserve.engine.protocol import (
    Add,
    Cancel,
    Choice,
    Event,
    Failed,
    Heartbeat,
    Outputs,
    RankStatus,
    Ready,
    Reply,
    Report,
    RequestOutput,
    Status,
    StepMessage,
    Stop,
)
from tpserve.engine.sampling_params import SamplingParams

EVENTS: list[Event] = [
    Add("a", [1, 2], SamplingParams(seed=2**64 - 1, stop_token_ids=(3,)), [Choice(1, [7])], -2),
    Cancel("b"),
    Report(3),
    Stop(),
]
REPLIES: list[Reply] = [
    Ready(2, 10, 16, 512, "cpu"),
    Failed("no"),
    Heartbeat(1, 2, 3, 4, 5),
    Status(1, [RankStatus(0, 5, 2**32 - 1, 0)]),
    Outputs([RequestOutput("a", [1], [-0.5], "stop"), RequestOutput("b", error="x")]),
]


def test_messages_survive_the_wire() -> None:
    message = StepMessage(9, EVENTS)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=StepMessage) == message
    for reply in REPLIES:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=Reply) == reply


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    for kind in (Event, Reply, StepMessage, RankStatus):
        try:
            decoded = msgspec.msgpack.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        assert isinstance(decoded, kind if isinstance(kind, type) else kind.__args__)


def test_a_pickle_is_no_message() -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.msgpack.decode(pickle.dumps(EVENTS[1]), type=Event)
