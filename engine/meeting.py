"""Where the ranks of a group find each other's sockets: rank 0 opens them and tells the others, once."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from tpserve.engine.channel import Addresses, FollowerChannel, LeaderChannel
from tpserve.model.parallel import TensorParallel

_MAX_BYTES = 1 << 16


@contextlib.contextmanager
def leader_channel(
    tp: TensorParallel, device: torch.device, timeout_s: float, folder: Path | None = None
) -> Iterator[LeaderChannel]:
    """Rank 0's channel to the others, which call `follower_channel` at the same time.

    Args:
        tp: this rank's place.
        device: of the group's collectives.
        timeout_s: see `LeaderChannel`.
        folder: for sockets on one machine, 0700, known to all ranks; None: one is made and told them.
    """
    with contextlib.ExitStack() as undo:
        if not is_one_machine():
            channel = _tcp_channel(tp.size, timeout_s)
        else:
            if folder is None:
                own = Path(tempfile.mkdtemp(prefix="tpserve-"))  # mode 0700
                undo.callback(shutil.rmtree, own, ignore_errors=True)
            channel = LeaderChannel(Addresses.in_folder(folder or own, tp.size), timeout_s)
        if folder is None or not is_one_machine():
            _tell(channel.addresses, tp, device)
        yield channel


def follower_channel(
    tp: TensorParallel, device: torch.device, timeout_s: float, folder: Path | None = None
) -> FollowerChannel:
    """The channel of a rank above 0; see `leader_channel`."""
    if folder is not None and is_one_machine():
        return FollowerChannel(Addresses.in_folder(folder, tp.size), tp.rank, timeout_s)
    return FollowerChannel(_tell(None, tp, device), tp.rank, timeout_s)


def is_one_machine() -> bool:
    """Whether torchrun started all ranks on this machine."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size


def _tcp_channel(size: int, timeout_s: float) -> LeaderChannel:
    # Where the others have found the rendezvous they find this machine, too.
    host = socket.gethostbyname(os.environ["MASTER_ADDR"])
    (server_key, secret), (client_key, client_secret) = (_key_pair() for _ in range(2))
    anywhere = [f"tcp://{host}:*"] * size
    addresses = Addresses(anywhere[1:], anywhere[0], server_key, client_key, client_secret)
    return LeaderChannel(addresses, timeout_s, secret)


def _key_pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _tell(addresses: Addresses | None, tp: TensorParallel, device: torch.device) -> Addresses:
    """Rank 0's addresses, on every rank."""
    if tp.size == 1:
        assert addresses is not None
        return addresses
    buffer = torch.zeros(_MAX_BYTES, dtype=torch.uint8, device=device)
    if addresses is not None:
        data = msgspec.json.encode(addresses)
        buffer[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(buffer, 0, group=tp.group)
    return msgspec.json.decode(bytes(buffer.tolist()).rstrip(b"\0"), type=Addresses)
