"""One served model for the tests that leave it running."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.serve.process import Served
from tests.text.models import load, tiny_model
from tpserve.convert.convert import convert

KEY = {"Authorization": "Bearer 1e5"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a real tokenizer, from shards of model-parallel size 2."""
    folder = tmp_path_factory.mktemp("serve")
    pieces = load(tiny_model()).vocab_size
    write_fairscale_checkpoint(folder / "shards", {**TINY_PARAMS, "vocab_size": -(-pieces // 8) * 8}, mp=2)
    return convert(folder / "shards", folder / "tiny", tokenizer_path=tiny_model(), progress=False)


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers of one rank that the test ends itself."""
    started: list[Served] = []

    def one(*options: str) -> Served:
        served = Served(checkpoint, tmp_path / f"log-{len(started)}", "--standby", "False", *options)
        started.append(served)
        return served

    yield one
    for served in started:
        served.close()


@pytest.fixture(scope="package")
def served(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """TP 2, with keys; in the end it is killed, and no rank may outlive it."""
    log = tmp_path_factory.mktemp("log") / "log"
    # A number with an exponent, and a list: what the command line's parser would make something else of.
    options = ["--tp", "2", "--api_key", "1e5", "--api-key=[x]", "--max_seq_len", "1024", "--request_timeout_s", "5"]
    options += ["--standby", "False"]
    one = Served(checkpoint, log, *options, env={"TPSERVE_API_KEYS": "from-env"})
    try:
        assert one.wait_until_ready().startswith("serving tiny at http://127.0.0.1:")
        yield one
        assert len(one.pids) > 3
        one.signal(signal.SIGKILL)
        assert one.wait() == -signal.SIGKILL
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        one.close()
