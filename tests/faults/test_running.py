"""A server does not mind what happens to its checkpoint folder; a relaunch that reads a damaged one says so."""

from __future__ import annotations

import os
import signal
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
