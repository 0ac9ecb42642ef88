"""One checkpoint, and what one rank makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.local import LocalEngine
from tests.helpers.requests import Collected
from tests.helpers.shards import TINY_PARAMS, write_fairscale_checkpoint
from tests.machines.serving import OPTIONS, PROMPT
from tpserve.convert.convert import convert
from tpserve.engine.config import EngineConfig


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("machines")
    write_fairscale_checkpoint(made / "in", {**TINY_PARAMS, "vocab_size": 200}, mp=2, seed=5)
    convert(made / "in", made / "out", progress=False)
    return made


@pytest.fixture(scope="package")
def alone(folder: Path) -> list[int]:
    """What one rank says."""
    engine = LocalEngine(EngineConfig(checkpoint_dir=str(folder / "out"), device="cpu", max_seq_len=256))
    stream = Collected(engine, PROMPT, **OPTIONS)  # type: ignore[arg-type]
    engine.run()
    return stream.wait()
