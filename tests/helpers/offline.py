"""Offline batches of one rank in this process, as torchrun starts them: another import of torch for each takes long."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import pytest

from tpserve.engine import generate
from tpserve.engine.channel import LeaderChannel
from tpserve.engine.meeting import leader_channel


@contextlib.contextmanager
def _closed(*arguments: Any) -> Iterator[LeaderChannel]:
    """The command's process ends with its batch, and its socket with it; this one goes on."""
    with leader_channel(*arguments) as channel:
        yield channel
        channel._status.close()


def generate_here(checkpoint: Path, prompts: Path, out: Path, *options: str) -> None:
    """`python -m tpserve.engine.generate` on the CPU.

    Raises:
        SystemExit: as the command ends where it cannot begin.
    """
    files = ["--checkpoint", str(checkpoint), "--prompts", str(prompts), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        patch.setattr(logging, "basicConfig", lambda **_options: None)  # it would outlive the test
        patch.setattr(generate, "leader_channel", _closed)
        fire.Fire(generate.generate, [*files, "--device", "cpu", *options])
