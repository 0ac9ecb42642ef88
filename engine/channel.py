"""How the ranks of one group talk, beside their collectives: msgpack messages over ipc sockets in a 0700 directory.

Rank 0 sends every other rank one `StepMessage` a step, in order and without loss; the others send back a
`RankStatus` now and then. Nobody waits for an answer.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import zmq

from tpserve.engine.errors import EngineError
from tpserve.engine.protocol import RankStatus, RankTrace, StepMessage

_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(StepMessage)
_status_decoder = msgspec.msgpack.Decoder(RankStatus | RankTrace)


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
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._followers = [new_socket(zmq.PUSH, f"ipc://{folder}/rank{r}", bind=True) for r in range(1, size)]
        self._status = new_socket(zmq.PULL, f"ipc://{folder}/status", bind=True)

    def send(self, message: StepMessage) -> None:
        """Sends the step's events to every other rank."""
        data = _encoder.encode(message)
        for socket in self._followers:
            socket.send(data)

    def receive(self) -> list[RankStatus | RankTrace]:
        """What the others reported since the last call; does not wait."""
        statuses: list[RankStatus | RankTrace] = []
        while self._status.poll(0):
            statuses.append(_status_decoder.decode(self._status.recv()))
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
        self._timeout_s = timeout_s

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
