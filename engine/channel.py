"""How the ranks of one group talk, beside their collectives: msgpack messages.

On one machine over ipc sockets in a 0700 directory; between machines over TCP, encrypted and to nobody who has not
the server's key (CurveZMQ; the keys come from whoever launched the group, or travel with its rendezvous, `meeting.py`).

Rank 0 sends every other rank one `StepMessage` a step, in order and without loss; the others send back a
`RankStatus` now and then, and a `Beat` at least once a second. Nobody waits for an answer.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tpserve.engine.errors import EngineError
from tpserve.engine.protocol import Beat, RankStatus, RankTrace, StepMessage

_encoder = msgspec.msgpack.Encoder()
_step_decoder = msgspec.msgpack.Decoder(StepMessage)
_status_decoder = msgspec.msgpack.Decoder(Beat | RankStatus | RankTrace)
BEAT_INTERVAL_S = 0.5
KEYS_FILE = "keys.json"  # in a group's folder on each of its machines, if there are several


class Addresses(msgspec.Struct, frozen=True):
    """Where a group's rank 0 is heard.

    Attributes:
        ranks: what each rank above 0 connects to.
        status: what all of them report to.
        server_key, client_key, client_secret: CurveZMQ's, in Z85; empty on one machine.
    """

    ranks: list[str]
    status: str
    server_key: str = ""
    client_key: str = ""
    client_secret: str = ""

    @classmethod
    def in_folder(cls, folder: Path, size: int) -> Addresses:
        """Of a group of `size` ranks on one machine."""
        return cls([f"ipc://{folder}/rank{r}" for r in range(1, size)], f"ipc://{folder}/status")


class ChannelKeys(msgspec.Struct, frozen=True):
    """CurveZMQ's, of one group over several machines, in Z85: the leader's pair, and one that all others share."""

    server_key: str
    server_secret: str
    client_key: str
    client_secret: str

    @classmethod
    def draw(cls) -> ChannelKeys:
        """New ones."""
        return cls(*(key.decode() for _ in range(2) for key in zmq.curve_keypair()))


def new_socket(kind: int, address: str, *, bind: bool, **options: Any) -> zmq.Socket[bytes]:
    """A socket without limits on its queue, which drops what is unsent when it closes.

    Args:
        kind: ZeroMQ's.
        address: its end.
        bind: whether it is the end that the other connects to.
        options: attributes of the socket.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 0
    for name, value in options.items():
        setattr(socket, name, value)
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
        addresses: where to bind; a TCP port of `*` is a free one. With a server's key, both ends encrypt.
        timeout_s: a rank that is silent for so long is taken for hung; infinite: nobody is.
        secret: that belongs to the server's key.

    Attributes:
        addresses: where the others connect to.
    """

    def __init__(self, addresses: Addresses, timeout_s: float = math.inf, secret: str = "") -> None:
        self._timeout_s = timeout_s
        self._looked_s = time.monotonic()
        self._heard_s = dict.fromkeys(range(1, len(addresses.ranks) + 1), self._looked_s)
        keys = {"curve_server": True, "curve_secretkey": secret.encode()} if secret else {}
        self._followers = [new_socket(zmq.PUSH, address, bind=True, **keys) for address in addresses.ranks]
        self._status = new_socket(zmq.PULL, addresses.status, bind=True, **keys)
        self.addresses = msgspec.structs.replace(
            addresses, ranks=[_endpoint(socket) for socket in self._followers], status=_endpoint(self._status)
        )

    def send(self, message: StepMessage) -> None:
        """Sends the step's events to every other rank."""
        if self._followers:
            data = _encoder.encode(message)
            for socket in self._followers:
                socket.send(data)

    def receive(self) -> list[RankStatus | RankTrace]:
        """What the others reported since the last call; does not wait.

        Raises:
            EngineError: one of them has fallen silent.
        """
        statuses: list[RankStatus | RankTrace] = []
        if not self._followers:
            return statuses
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
        addresses: of rank 0.
        rank: this rank.
        timeout_s: rank 0 sends at least every second; without a message for so long, it is taken for hung.
    """

    def __init__(self, addresses: Addresses, rank: int, timeout_s: float) -> None:
        keys: dict[str, bytes] = {}
        if addresses.server_key:
            names = ("curve_serverkey", "curve_publickey", "curve_secretkey")
            values = (addresses.server_key, addresses.client_key, addresses.client_secret)
            keys = {name: value.encode() for name, value in zip(names, values, strict=True)}
        self._events = new_socket(zmq.PULL, addresses.ranks[rank - 1], bind=False, **keys)
        self._status = new_socket(zmq.PUSH, addresses.status, bind=False, **keys)
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


def _endpoint(socket: zmq.Socket[bytes]) -> str:
    """Where a bound socket can be reached; a port that was chosen included."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
