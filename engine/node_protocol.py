"""What the head of a group over several machines and the agents of the others say, and the keys they say it with.

Msgpack of these types, over TCP, both ends encrypted and known to each other (CurveZMQ).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import importlib.metadata
import os
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from tpserve.convert.kinds import Kind, kind_of
from tpserve.engine.channel import ChannelKeys
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import ConfigError
from tpserve.engine.weights import checkpoint_fingerprint

KEY_VARIABLE = "TPSERVE_NODE_KEY"
PING_S = 0.1
SILENCE_S = 10.0  # a connection that is not closed and says nothing for so long is lost
MAX_BYTES = 1 << 20  # of a message
_MIN_KEY_CHARACTERS = 32


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """An agent's first word: what its machine is called, and what runs there (`versions`)."""

    name: str
    versions: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A part of a group has ended, or could not begin.

    Attributes:
        group: which.
        reason: a sentence.
        refused: the next group's would not begin either.
    """

    group: str
    reason: str
    refused: bool = False


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Either end lives."""


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """Launch a part of a group, which then waits for `Go`.

    Attributes:
        group: its name.
        config: of the ranks.
        rank: of the machine.
        address, port: of torchrun's store, on the head.
        keys: of the ranks' channel.
        checkpoint: what the head has in its folder; see `checkpoint_identity`.
    """

    group: str
    config: EngineConfig
    rank: int
    address: str
    port: int
    keys: ChannelKeys
    checkpoint: str


class Go(msgspec.Struct, frozen=True, tag="go"):
    """Let the ranks of a group take their devices."""

    group: str


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """Leave nothing of a group."""

    group: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The head does not want this agent."""

    reason: str


NodeWord = Hello | Ended | Ping
HeadWord = Launch | Go | Kill | Ping | Refused


@dataclasses.dataclass(frozen=True)
class NodeKeys:
    """CurveZMQ's keys of the head and of its agents, in Z85."""

    head_public: bytes
    head_secret: bytes
    node_public: bytes
    node_secret: bytes

    @classmethod
    def derive(cls, key: str) -> NodeKeys:
        """From what head and agents share.

        Raises:
            ConfigError: it is too short to be secret.
        """
        if len(key) < _MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"the machines' key has {len(key)} characters, it must have {_MIN_KEY_CHARACTERS} at least: "
                "openssl rand -hex 32"
            )
        head, node = (
            z85.encode(hmac.digest(key.encode(), f"tpserve {who}".encode(), "sha256")) for who in ("head", "node")
        )
        return cls(zmq.curve_public(head), head, zmq.curve_public(node), node)

    @classmethod
    def load(cls, path: str | None) -> NodeKeys:
        """From a file, or from the environment.

        Raises:
            ConfigError: there is none, or it is too short.
        """
        if path is None:
            key = os.environ.get(KEY_VARIABLE, "")
            if not key:
                raise ConfigError(f"the machines' key is missing: name its file, or set {KEY_VARIABLE}")
        else:
            try:
                key = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"the machines' key cannot be read: {e}") from None
        return cls.derive(key.strip())


def versions() -> str:
    """What must be the same on all machines, for their ranks decide alike only with the same program."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tpserve", "torch"))


def checkpoint_identity(path: Path) -> str:
    """Tells one checkpoint from another, on whichever machine a copy of it is.

    Other people's files bring no sums: their names and sizes are compared.

    Raises:
        OSError, CheckpointError: it cannot be read.
    """
    if kind_of(path) is Kind.TPSERVE:
        return checkpoint_fingerprint(path)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return hashlib.sha256("\n".join(f"{file.name}\0{file.stat().st_size}" for file in files).encode()).hexdigest()[:16]
