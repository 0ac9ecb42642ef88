"""Servers for the tests here: a start costs ten seconds, so each is shared by all tests that can live with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.text.models import load, tiny_model
from tests.torchserve.server import Server
from tpserve.convert.convert import convert
from tpserve.handler.archive import archive, default_config

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A scratch folder with a short name: sockets live below it, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="tps-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def tiny_checkpoint(folder: Path) -> Path:
    """A random Llama with a real tokenizer, from shards of model-parallel size 2."""
    pieces = load(tiny_model()).vocab_size
    source = folder / "tiny-shards"
    write_fairscale_checkpoint(source, {**TINY_PARAMS, "vocab_size": -(-pieces // 8) * 8}, mp=2)
    return convert(source, folder / "tiny", tokenizer_path=tiny_model(), progress=False)


@pytest.fixture(scope="session")
def server(folder: Path, tiny_checkpoint: Path) -> Iterator[Server]:
    """Ours: a `.mar`, continuous batching, TP 2."""
    config = written_config(
        folder / "server.yaml", mode="chat", max_batch_size=16, max_num_waiting=24, max_new_tokens=240
    )
    made = archive(tiny_checkpoint, config=config, export_path=folder / "store")
    yield from running(Server(folder / "store", [made.models]))


def written_config(path: Path, dim: int = 32, **handler: Any) -> Path:
    """The default configuration for a width, with changes. No standby group: two cores are busy enough."""
    content = yaml.safe_load(default_config(dim).read_text())
    content["handler"] |= {"standby": False, **handler}
    path.write_text(yaml.safe_dump(content))
    return path


def running(server: Server, clean_log: bool = True) -> Iterator[Server]:
    """Waits for the server; afterwards no process may be left, and no traceback in its log."""
    try:
        server.wait_until_ready()
        yield server
    finally:
        left = server.stop()
        log = server.log.read_text()
        server.process.remove()
    assert not left, f"outlived the server: {left}"
    assert not clean_log or "Traceback" not in log, log[-8000:]
