"""How the ranks of one group talk, beside their collectives: msgpack messages over ipc sockets in a 0700 directory.

Rank 0 sends every other rank one `StepMessage` a step, in order and without loss; the others send back a
`RankStatus` now and then, and a `Beat` at least once a second. Nobody waits for an answer.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import zmq

from tpserve.engine.errors import EngineError
from tpserve.engine.protocol import Beat, RankStatus, RankTrace, StepMessage

_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(StepMessage)
_status_decoder = msgspec.msgpack.Decoder(Beat | RankStatus | RankTrace)
BEAT_INTERVAL_S = 0.5


def new_socket(kind: int, address: str, *, bind: bool) -> zmq.Socket[bytes]:
    """A socket without limits on its queue, which drops what is unsent when it closes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 0
    try:
        if bind:
            socket.bind(address)
        else:
            socket.connect(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


class LeaderChannel:
    """Rank 0's end.

    Args:
        folder: where the sockets are.
        size: ranks of the group.
        timeout_s: a rank that is silent for so long is taken for hung; infinite: nobody is.
    """

    def __init__(self, folder: Path, size: int, timeout_s: float = math.inf) -> None:
        self._timeout_s = timeout_s
        self._looked_s = time.monotonic()
        self._heard_s = dict.fromkeys(range(1, size), self._looked_s)
        self._followers = [new_socket(zmq.PUSH, f"ipc://{folder}/rank{r}", bind=True) for r in range(1, size)]
        self._status = new_socket(zmq.PULL, f"ipc://{folder}/status", bind=True)

    def send(self, message: StepMessage) -> None:
        """Sends the step's events to every other rank."""
        data = _encoder.encode(message)
        for socket in self._followers:
            socket.send(data)

    def receive(self) -> list[RankStatus | RankTrace]:
        """What the others reported since the last call; does not wait.

        Raises:
            EngineError: one of them has fallen silent.
        """
        statuses: list[RankStatus | RankTrace] = []
        now_s = time.monotonic()
        if now_s - self._looked_s > self._timeout_s / 2:
            # A long step, in which they could not speak, or this process was stopped: their time begins now.
            self._heard_s = dict.fromkeys(self._heard_s, now_s)
        self._looked_s = now_s
        while self._status.poll(0):
            message = _status_decoder.decode(self._status.recv())
            self._heard_s[message.rank] = now_s
            if not isinstance(message, Beat):
                statuses.append(message)
        for rank, heard_s in self._heard_s.items():
            if now_s - heard_s > self._timeout_s:
                raise EngineError(f"no sign of life from rank {rank} for {self._timeout_s:g} s")
        return statuses


class FollowerChannel:
    """The end of a rank above 0.

    Args:
        folder: where the sockets are.
        rank: this rank.
        timeout_s: rank 0 sends at least every second; without a message for so long, it is taken for hung.
    """

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self._events = new_socket(zmq.PULL, f"ipc://{folder}/rank{rank}", bind=False)
        self._status = new_socket(zmq.PUSH, f"ipc://{folder}/status", bind=False)
        self._rank, self._timeout_s = rank, timeout_s
        self._beat_s = -math.inf

    def receive(self) -> StepMessage:
        """The next step's events.

        Raises:
            EngineError: rank 0 fell silent.
        """
        if not self._events.poll(int(self._timeout_s * 1000)):
            raise EngineError(f"no message from rank 0 for {self._timeout_s:g} s")
        return _step_decoder.decode(self._events.recv())

    def send(self, status: RankStatus | RankTrace) -> None:
        """Reports to rank 0."""
        self._status.send(_encoder.encode(status))

    def beat(self) -> None:
        """Tells rank 0 that this rank lives, unless it has just been told; called once a step."""
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_INTERVAL_S / 2:
            self._beat_s = now_s
            self._status.send(_encoder.encode(Beat(self._rank)))
