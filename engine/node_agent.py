"""The agent of a machine that holds ranks of a group whose head is elsewhere: it does what the head says, no more."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq

from tpserve.engine.channel import new_socket
from tpserve.engine.errors import ConfigError, EngineError
from tpserve.engine.node_place import Place, address_towards
from tpserve.engine.node_protocol import (
    MAX_BYTES,
    PING_S,
    SILENCE_S,
    Ended,
    Go,
    HeadWord,
    Hello,
    Kill,
    Launch,
    NodeKeys,
    NodeWord,
    Ping,
    Refused,
    checkpoint_identity,
    versions,
)
from tpserve.engine.supervisor import RankGroup
from tpserve.model.checkpoint import CheckpointError

_POLL_MS = 50
_CONNECT_S = 3.0
_AGAIN_S = 0.5  # between two attempts
_REFUSED_S = 5.0  # likewise, when the head has said that it does not want this agent
_ALIVE_S = 1.0

logger = logging.getLogger(__name__)


class HeadLostError(Exception):
    """There is no connection to the head, or the head does not want this agent.

    Attributes:
        nobody: its machine answers, and nobody listens there.
    """

    def __init__(self, message: str, nobody: bool = False) -> None:
        super().__init__(message)
        self.nobody = nobody


@dataclasses.dataclass(frozen=True)
class OneLife:
    """Makes an agent one for one life of one head.

    Attributes:
        start_s: so long it waits for that to begin.
        starter: host and port at which somebody listens as long as there is who starts the head; None: unknown.
    """

    start_s: float
    starter: tuple[str, int] | None

    def is_over(self) -> bool:
        """Whether nobody is left to begin it."""
        try:
            if self.starter is not None:
                address_towards(*self.starter, _CONNECT_S)
        except ConnectionRefusedError:
            return True
        except OSError:  # it cannot be known now
            pass
        return False


class NodeAgent:
    """See the module's text. Its ranks die with the thread that runs it.

    Args:
        head: HOST:PORT of the head's hub.
        keys: shared with the head.
        name: of this machine, unlike any other's.
        checkpoint: where the checkpoint is here; None: where it is on the head.
        alive_file: written every second, for probes: "connected" or "waiting".
        drain_timeout_s: after `leave`, so long it goes on for a head that is still there.
        one_life: None: it asks for a head again and again, for ever.

    Raises:
        ConfigError: `head` names no port.
    """

    def __init__(
        self,
        head: str,
        keys: NodeKeys,
        name: str,
        *,
        checkpoint: str | None = None,
        alive_file: str | None = None,
        drain_timeout_s: float = 30.0,
        one_life: OneLife | None = None,
    ) -> None:
        host, colon, port = head.rpartition(":")
        if not (colon and host and port.isdecimal() and int(port) < 65536):
            raise ConfigError(f"head must be HOST:PORT, got {head!r}")
        self._host, self._port = host, int(port)
        self._keys, self._name, self._checkpoint = keys, name, checkpoint
        self._alive_file = None if alive_file is None else Path(alive_file)
        self._drain_timeout_s, self._one_life = drain_timeout_s, one_life
        self._leave_at_s = math.inf
        self._alive_s = -math.inf
        self._refused = self._heard = False
        self._groups: dict[str, RankGroup] = {}
        self._ended: set[str] = set()  # of which the head knows
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[HeadWord] = msgspec.msgpack.Decoder(HeadWord)

    def leave(self) -> None:
        """Ends `run` when the head goes, or when the time to drain is over; called twice, at once."""
        asked_before = self._leave_at_s < math.inf
        self._leave_at_s = time.monotonic() + (0.0 if asked_before else self._drain_timeout_s)

    def run(self) -> None:
        """Connects to the head, again and again, and serves it, until `leave`.

        Raises:
            EngineError: it was for one life of the head, which is over, or will not begin.
        """
        said: str | None = None
        began_s = time.monotonic()
        while self._leave_at_s == math.inf:
            try:
                with self._session() as socket:
                    said, self._refused = said if self._refused else None, False
                    self._serve(socket)
            except HeadLostError as e:
                if self._leave_at_s == math.inf and self._is_all_over(e, time.monotonic() - began_s):
                    raise EngineError(str(e)) from None
                if str(e) != said:
                    logger.warning("%s; asking again until it answers", e)
                said = str(e)
            until_s = time.monotonic() + (_REFUSED_S if said and self._refused else _AGAIN_S)
            while self._leave_at_s == math.inf and time.monotonic() < until_s:
                self._show("waiting")
                time.sleep(_POLL_MS / 1000)

    def _is_all_over(self, lost: HeadLostError, since_s: float) -> bool:
        if self._one_life is None:
            return False
        if self._refused or (self._heard and lost.nobody):
            return True
        return not self._heard and (since_s > self._one_life.start_s or (lost.nobody and self._one_life.is_over()))

    @contextmanager
    def _session(self) -> Iterator[zmq.Socket[bytes]]:
        """A connection on which the head has been greeted; at its end every rank is killed."""
        where = f"{self._host}:{self._port}"
        try:
            self._own_address = address_towards(self._host, self._port, _CONNECT_S)
            socket = new_socket(
                zmq.DEALER, f"tcp://{where}", bind=False,
                # One socket, one connection: what is sent on it reaches who was greeted on it, or nobody.
                immediate=1, reconnect_ivl=-1, maxmsgsize=MAX_BYTES, curve_serverkey=self._keys.head_public,
                curve_publickey=self._keys.node_public, curve_secretkey=self._keys.node_secret,
            )  # fmt: skip
        except (OSError, zmq.ZMQError) as e:
            raise HeadLostError(f"no head at {where}: {e}", isinstance(e, ConnectionRefusedError)) from None
        try:
            until_s = time.monotonic() + _CONNECT_S
            while not socket.poll(_POLL_MS, zmq.POLLOUT):
                self._show("waiting")
                if time.monotonic() > until_s or self._leave_at_s < math.inf:
                    raise HeadLostError(f"the head at {where} does not answer: it has another key, or is none")
            self._say(socket, Hello(self._name, versions()))
            logger.info("machine %s: connected to the head at %s", self._name, where)
            yield socket
        finally:
            socket.close()
            for group in self._groups.values():
                group.kill()
            self._groups.clear()
            self._ended.clear()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        heard_s = pinged_s = time.monotonic()
        while time.monotonic() < self._leave_at_s:
            self._show("connected")
            while socket.poll(0 if self._groups.keys() - self._ended else _POLL_MS):
                self._obey(socket, self._decoder.decode(socket.recv()))
                heard_s = time.monotonic()
            self._watch(socket)
            if time.monotonic() - pinged_s >= PING_S:
                pinged_s = time.monotonic()
                self._say(socket, Ping())
            if time.monotonic() - heard_s > SILENCE_S:
                raise HeadLostError(f"the head was silent for {SILENCE_S:g} s")

    def _obey(self, socket: zmq.Socket[bytes], word: HeadWord) -> None:
        self._heard = True
        match word:
            case Launch():
                try:
                    self._launch(word)
                except (ConfigError, CheckpointError) as e:
                    self._say(socket, Ended(word.group, str(e), refused=True))
                except Exception as e:  # no disk, no process: the head may try again
                    logger.exception("launching a part of a group")
                    self._say(socket, Ended(word.group, f"its part could not be launched: {e}"))
            case Go(group):
                if group in self._groups:
                    self._groups[group].go()
            case Kill(group):
                if group in self._groups:
                    self._groups.pop(group).kill()
                self._ended.discard(group)
            case Refused(reason):
                self._refused = True
                raise HeadLostError(f"the head does not want machine {self._name}: {reason}")

    def _launch(self, word: Launch) -> None:
        config = word.config if self._checkpoint is None else word.config.with_checkpoint(Path(self._checkpoint))
        try:
            found = checkpoint_identity(Path(config.checkpoint_dir))
        except OSError as e:
            raise ConfigError(f"checkpoint_dir {config.checkpoint_dir}: {e}") from None
        if found != word.checkpoint:
            raise ConfigError(f"checkpoint_dir {config.checkpoint_dir} holds another checkpoint than the head's")
        place = Place(word.rank, word.address, word.port, self._own_address, word.keys)
        self._groups[word.group] = RankGroup(config, place)

    def _watch(self, socket: zmq.Socket[bytes]) -> None:
        """Tells the head what has ended since the last look; takes as long as a poll."""
        living = self._groups.keys() - self._ended
        for name in living:
            group = self._groups[name]
            group.receive(_POLL_MS / 1000 / len(living))
            # That a serving one is stopped is noticed by its silence.
            stopped = "one of its processes is stopped" if not group.has_gone and group.is_stopped else None
            reason = group.death or stopped
            if reason is not None:
                logger.warning("group %s: %s", name, reason)
                self._ended.add(name)
                self._say(socket, Ended(name, reason))

    def _say(self, socket: zmq.Socket[bytes], word: NodeWord) -> None:
        try:
            socket.send(self._encoder.encode(word), zmq.NOBLOCK)
        except zmq.Again:
            raise HeadLostError("the head has closed the connection") from None

    def _show(self, state: str) -> None:
        if self._alive_file is not None and time.monotonic() - self._alive_s >= _ALIVE_S:
            self._alive_s = time.monotonic()
            self._alive_file.write_text(state + "\n", encoding="utf-8")


def run_agent(agent: NodeAgent) -> None:
    """Runs an agent as this process's work: SIGTERM and SIGINT make it leave."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.leave())
    agent.run()
