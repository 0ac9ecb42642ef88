"""The step loop."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import pytest

from tpserve.engine.config import EngineConfig
from tpserve.engine.loop import follow, lead


class Ended:
    """A core, a channel and a frontend of a group that has been told to stop."""

    stopped: ClassVar = True


@pytest.mark.parametrize("leads", [True, False])
def test_a_rank_starts_with_a_heap_that_no_collection_walks(leads: bool, tiny_config: EngineConfig) -> None:
    """A full round over what torch's import leaves takes 0.15 s, and is everybody's pause."""
    nothing: Any = Ended()
    gc.unfreeze()
    try:
        if leads:
            lead(nothing, tiny_config, nothing, nothing)
        else:
            follow(nothing, tiny_config, nothing)
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
