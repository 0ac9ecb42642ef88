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

from tpserve.engine.channel import KEYS_FILE, Addresses, ChannelKeys, FollowerChannel, LeaderChannel
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
        folder: 0700, for sockets on one machine, known to all ranks, None: one is made and told them; over several
            machines, each has its own, and in it the channel's keys, if not they are drawn and told.
    """
    with contextlib.ExitStack() as undo:
        if not is_one_machine():
            channel = _tcp_channel(tp.size, timeout_s, _keys_in(folder) or ChannelKeys.draw())
        else:
            if folder is None:
                own = Path(tempfile.mkdtemp(prefix="tpserve-"))  # mode 0700
                undo.callback(shutil.rmtree, own, ignore_errors=True)
            channel = LeaderChannel(Addresses.in_folder(folder or own, tp.size), timeout_s)
        if not is_one_machine():
            addresses = channel.addresses
            if _keys_in(folder) is not None:  # the others have them from whoever launched them
                addresses = msgspec.structs.replace(addresses, server_key="", client_key="", client_secret="")
            _tell(addresses, tp, device)
        elif folder is None:
            _tell(channel.addresses, tp, device)
        yield channel


def follower_channel(
    tp: TensorParallel, device: torch.device, timeout_s: float, folder: Path | None = None
) -> FollowerChannel:
    """The channel of a rank above 0; see `leader_channel`."""
    if folder is not None and is_one_machine():
        return FollowerChannel(Addresses.in_folder(folder, tp.size), tp.rank, timeout_s)
    addresses, keys = _tell(None, tp, device), _keys_in(folder)
    if keys is not None:
        names = "server_key", "client_key", "client_secret"
        addresses = msgspec.structs.replace(addresses, **{name: getattr(keys, name) for name in names})
    return FollowerChannel(addresses, tp.rank, timeout_s)


def is_one_machine() -> bool:
    """Whether torchrun started all ranks on this machine."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world_size) == world_size


def _tcp_channel(size: int, timeout_s: float, keys: ChannelKeys) -> LeaderChannel:
    # Where the others have found the rendezvous they find this machine, too.
    host = socket.gethostbyname(os.environ["MASTER_ADDR"])
    anywhere = [f"tcp://{host}:*"] * size
    addresses = Addresses(anywhere[1:], anywhere[0], keys.server_key, keys.client_key, keys.client_secret)
    return LeaderChannel(addresses, timeout_s, keys.server_secret)


def _keys_in(folder: Path | None) -> ChannelKeys | None:
    """The group's, where whoever launched it has given it some."""
    if folder is None or not (folder / KEYS_FILE).exists():
        return None
    return msgspec.json.decode((folder / KEYS_FILE).read_bytes(), type=ChannelKeys)


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
