"""Messages between the client and rank 0: all of them, in order, whole, and nobody waits for the other end."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpserve.engine.message_stream import ClientEnd, MessageStream

MANY = 20 << 20  # bytes; a socket's buffer holds some hundred thousand


@pytest.fixture
def ends() -> Iterator[tuple[MessageStream, MessageStream]]:
    a, b = map(MessageStream, socket.socketpair())
    yield a, b
    a.close()
    b.close()


def until(ready: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline_s
        time.sleep(1e-3)


def test_messages_of_all_sizes_come_whole_and_in_order(ends: tuple[MessageStream, MessageStream]) -> None:
    a, b = ends
    drawn = random.Random(0)
    groups = [[drawn.randbytes(drawn.choice((0, 1, 5, 1000, 300_000))) for _ in range(n)] for n in (1, 3, 0, 1, 7, 2)]
    got: list[bytes] = []
    for group in groups:
        a.send(group)
        got += b.receive()
    expected = [message for group in groups for message in group]

    def more() -> bool:
        a.flush()
        got.extend(b.receive())
        return len(got) == len(expected)

    until(more)
    assert got == expected
    assert b.receive() == []
    assert not a.has_unsent


def test_what_is_sent_together_comes_together() -> None:
    """Also where a frame comes in pieces."""
    raw, other = socket.socketpair()
    stream = MessageStream(other)
    frame = struct.pack("<I", 15) + struct.pack("<I", 3) + b"one" + struct.pack("<I", 4) + b"more"
    for i in range(len(frame)):
        assert stream.receive() == []
        raw.send(frame[i : i + 1])
    assert stream.receive() == [b"one", b"more"]
    raw.send(2 * frame + frame[:7])
    assert stream.receive() == 2 * [b"one", b"more"]
    raw.send(frame[7:])
    assert stream.receive() == [b"one", b"more"]
    raw.close()
    stream.close()


def test_nobody_waits_for_who_does_not_read(ends: tuple[MessageStream, MessageStream]) -> None:
    """Both ends have much to say, and neither listens: a rank in its step, and a client that submits."""
    a, b = ends
    started_s = time.monotonic()
    for i in range(20):
        a.send([bytes([i]) * (MANY // 20)])
        b.send([bytes([i]) * (MANY // 20)])
    assert time.monotonic() - started_s < 5
    assert a.has_unsent
    assert b.has_unsent
    got: tuple[list[bytes], list[bytes]] = ([], [])

    def all_there() -> bool:
        for end, messages in zip(ends, got, strict=True):
            end.wait(0.01)
            messages.extend(end.receive())
        return min(map(len, got)) == 20

    until(all_there)
    assert got[0] == got[1] == [bytes([i]) * (MANY // 20) for i in range(20)]


def test_last_words_are_heard_after_the_end(ends: tuple[MessageStream, MessageStream]) -> None:
    a, b = ends
    a.send([b"why"])
    a.flush_all(1.0)
    a.close()
    b.send([b"to nobody"])
    b.send([b"to nobody"])
    assert not b.has_unsent
    assert b.receive() == [b"why"]
    assert b.ended
    assert b.receive() == []
    started_s = time.monotonic()
    b.wait(0.2)  # does not spin
    assert time.monotonic() - started_s > 0.19


def test_last_words_that_find_no_room_are_waited_for(ends: tuple[MessageStream, MessageStream]) -> None:
    a, b = ends
    got: list[bytes] = []
    a.send([b"x" * MANY])
    reader = threading.Thread(target=lambda: until(lambda: got.extend(b.receive()) or bool(got)))  # type: ignore[func-returns-value]
    reader.start()
    a.flush_all(20.0)
    assert not a.has_unsent
    reader.join()
    assert got == [b"x" * MANY]


def test_the_client_speaks_before_it_is_heard(tmp_path: Path) -> None:
    client = ClientEnd(tmp_path)
    client.send([b"early", b"bird"])
    assert client.receive() == []
    rank = MessageStream.connect(tmp_path)
    heard, others = client.wait(5.0)  # for who connects
    assert (heard, others) == (False, [])
    rank.wait(5.0)
    assert rank.receive() == [b"early", b"bird"]
    rank.send([b"thanks"])
    assert client.wait(5.0) == (True, [])
    assert client.receive() == [b"thanks"]
    rank.close()
    assert client.wait(5.0) == (True, [])
    assert client.receive() == []
    started_s = time.monotonic()
    assert client.wait(0.2) == (False, [])  # does not spin
    assert time.monotonic() - started_s > 0.19
    client.send([b"to nobody"])
    client.close()
    client.send([b"to nobody"])


def test_who_connects_and_ends_at_once_is_heard(tmp_path: Path) -> None:
    client = ClientEnd(tmp_path)
    rank = MessageStream.connect(tmp_path)
    rank.send([b"why"])
    rank.close()
    assert client.receive() == [b"why"]
    client.close()


def test_what_found_no_room_goes_on_while_another_thread_waits(tmp_path: Path) -> None:
    """The one that waits is woken, for it does not know yet that there is something to send."""
    client = ClientEnd(tmp_path)
    rank = MessageStream.connect(tmp_path)
    client.wait(5.0)
    waited: list[float] = []

    def wait() -> None:
        started_s = time.monotonic()
        while client._stream is None or not waited:
            client.wait(20.0)
            waited.append(time.monotonic() - started_s)
        until(lambda: client.wait(0.001) == (True, []))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    client.send([b"x" * MANY])
    until(lambda: bool(waited))
    assert waited[0] < 10
    got: list[bytes] = []
    until(lambda: got.extend(rank.receive()) or bool(got))  # type: ignore[func-returns-value]
    assert got == [b"x" * MANY]
    rank.send([b"thanks"])
    waiting.join(20)
    assert client.receive() == [b"thanks"]
    client.close()
    rank.close()


def test_a_path_that_is_too_long_is_said(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with pytest.raises(OSError, match="too long"):
        ClientEnd(folder)
