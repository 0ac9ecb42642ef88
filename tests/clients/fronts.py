"""Both fronts with the demo model at TP 2, as clients find them."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.serve.process import Served
from tpserve.convert.convert import convert
from tpserve.handler.archive import archive, default_config
from tpserve.handler.server_process import TorchServeProcess

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "model_store" / "demo"
KEY = "sk-of-the-test"


@dataclasses.dataclass(frozen=True)
class Front:
    """A running server.

    Attributes:
        name: as users call it.
        url: where the protocols' paths begin, without a slash at its end.
        model: what it is called.
        key: that is asked for; TorchServe's tokens are off, but clients insist on sending one.
        log: what it printed.
    """

    name: str
    url: str
    model: str
    key: str
    log: Path


@contextlib.contextmanager
def converted() -> Iterator[Path]:
    """The demo model: what it says can be read, which a screenshot needs."""
    with tempfile.TemporaryDirectory(prefix="tps-") as name:  # short: sockets live below it
        yield convert(DEMO, Path(name) / "demo", progress=False)


@contextlib.contextmanager
def second_front(checkpoint: Path, log: Path) -> Iterator[Front]:
    """`tpserve serve`."""
    served = Served(checkpoint, log, "--tp", "2", "--max_new_tokens", "480", "--api_key", KEY)
    try:
        served.wait_until_ready()
        yield Front("tpserve serve", f"http://127.0.0.1:{served.port}", "demo", KEY, log)
    finally:
        served.close()


@contextlib.contextmanager
def torchserve(checkpoint: Path, log: Path) -> Iterator[Front]:
    """TorchServe with a `.mar`."""
    folder = checkpoint.parent
    content = yaml.safe_load(default_config(dim=256).read_text())
    content["handler"] |= {"mode": "chat", "max_batch_size": 16, "max_num_waiting": 64, "max_new_tokens": 480}
    config = folder / "clients.yaml"
    config.write_text(yaml.safe_dump(content))
    made = archive(checkpoint, config=config, export_path=folder / "store", tensor_parallel_size=2)
    server = TorchServeProcess(folder / "store", [made.models], disable_system_metrics="true")
    try:
        server.wait_until_ready(timeout_s=180)
        yield Front("TorchServe", f"{server.address}/predictions/llama/1.0", "llama", KEY, log)
    finally:
        server.stop()
        shutil.copy(server.log, log)
        server.remove()
