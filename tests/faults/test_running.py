"""A server listens on loopback only and does not mind what happens to its checkpoint
folder; a relaunch that reads a damaged one says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from pathlib import Path

import pytest
import torch

from tests.faults.checkpoints import LAYER, make
from tests.helpers.requests import Collected
from tpserve.convert.convert import convert
from tpserve.convert.errors import ConvertError
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig
from tpserve.engine.errors import EngineError
from tpserve.engine.process import command_line
from tpserve.handler.replies import error_reply
from tpserve.model.loader import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)[1]


def test_no_map_of_a_file_is_kept(folder: Path) -> None:
    model = load_model(folder).model
    before = [parameter.clone() for parameter in model.parameters()]
    assert str(folder) not in Path("/proc/self/maps").read_text()
    for path in folder.iterdir():
        os.truncate(path, 0)  # a read through a map would be a SIGBUS
    assert all(map(torch.equal, before, model.parameters()))


def listening(pids: list[int]) -> set[str]:
    """The addresses, as /proc/net/tcp writes them, on which these processes listen."""
    sockets: set[str] = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:  # TCP_LISTEN, inode
                found.add(fields[1].partition(":")[0])
    return found


def test_a_server_outlives_its_folder_and_a_relaunch_refuses(folder: Path) -> None:
    client = EngineClient(
        EngineConfig(
            checkpoint_dir=str(folder), tensor_parallel_size=2, device="cpu", max_seq_len=256, max_num_seqs=4,
            max_num_batched_tokens=64, step_timeout_s=60,
        )
    )  # fmt: skip
    request = {"max_new_tokens": 12, "ignore_eos": True, "seed": 3, "temperature": 0.9}
    try:
        client.start()
        # torchrun's store and gloo's sockets: on 127.0.0.1; our own: in a folder that nobody else may enter.
        assert listening(client.pids) == {"0100007F"}
        folders = {Path(command_line(pid)[-1]) for pid in client.pids}
        assert [stat.S_IMODE(path.stat().st_mode) for path in folders if path.is_dir()] == [0o700] * len(folders)
        expected = Collected(client, [5, 6], **request).wait()
        with pytest.raises(ConvertError, match="is not empty"):
            convert(folder.parent / "in", folder, progress=False)
        for path in folder.iterdir():  # in place: what is mapped or open somewhere changes under it
            with path.open("r+b") as f:
                f.write(b"\xff" * 64)
        os.truncate(folder / LAYER, 100)
        assert Collected(client, [5, 6], **request).wait() == expected
        stream = Collected(client, [7], **(request | {"max_new_tokens": 240}))
        stream.wait_tokens(1)
        for pid in client.pids:
            os.kill(pid, signal.SIGKILL)
        stream.wait()
        assert (stream.finish_reason, client.failure is None) == ("error", False)
        assert client.failure is not None
        assert str(folder) in client.failure  # for the operator
        assert "again" in client.failure
        with pytest.raises(EngineError) as error:
            client.submit("late", [5], stream.params, print)
        reply = error_reply(error.value)
        assert reply.status == 503
        assert b"given up" in reply.body
        assert str(folder.parent).encode() not in reply.body
    finally:
        client.close()
