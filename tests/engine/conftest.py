from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tpserve.convert.convert import convert
from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig

PARAMS = TINY_PARAMS | {"vocab_size": 200, "n_layers": 2}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted random network of 200 tokens; its answers differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp("tiny")
    write_fairscale_checkpoint(folder / "in", PARAMS, mp=2, seed=5)
    return convert(folder / "in", folder / "out", progress=False)


@pytest.fixture(scope="module")
def tiny_config(tiny_checkpoint: Path) -> EngineConfig:
    return EngineConfig(
        checkpoint_dir=str(tiny_checkpoint),
        tensor_parallel_size=2,
        device="cpu",
        max_seq_len=256,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        max_num_waiting=8,
        step_timeout_s=20,
        checksum_interval=4,
        standby=False,  # two cores are busy enough; test_restart has some
    )


@pytest.fixture(scope="module")
def client(tiny_config: EngineConfig) -> Iterator[EngineClient]:
    """Two ranks, shared by a module's tests; leaves no process."""
    from tpserve.engine.process import is_running

    client = EngineClient(tiny_config)
    client.start()
    pids = client.pids
    yield client
    client.close()
    assert not [pid for pid in {*pids, *client.pids} if is_running(pid)]
