"""A rank of the real engine that can be made to fail: `python -m tests.helpers.faulty_worker FOLDER`.

Rank 1 kills itself when a prompt holds `POISON`. With TPSERVE_TEST_DEVICES naming a file, a group of more ranks than
the number in it finds devices missing.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from tpserve.engine.config import EngineConfig
from tpserve.engine.core import EngineCore
from tpserve.engine.errors import MissingDevicesError
from tpserve.engine.group import build_core
from tpserve.engine.protocol import Add, Event
from tpserve.engine.worker import run
from tpserve.model.parallel import TensorParallel

POISON = 199
DEVICES = "TPSERVE_TEST_DEVICES"


def build(config: EngineConfig, device: torch.device, tp: TensorParallel) -> EngineCore:
    """The real core, but for what the module's text says."""
    if DEVICES in os.environ and tp.size > (num_devices := int(Path(os.environ[DEVICES]).read_text())):
        raise MissingDevicesError(f"{tp.size} ranks, {num_devices} devices", num_devices)
    core = build_core(config, device, tp)
    apply = core.apply

    def poisonous(events: list[Event]) -> None:
        if tp.rank == 1 and any(isinstance(event, Add) and POISON in event.prompt_token_ids for event in events):
            os.kill(os.getpid(), signal.SIGKILL)
        apply(events)

    core.apply = poisonous  # type: ignore[method-assign]
    return core


if __name__ == "__main__":
    run(build)
