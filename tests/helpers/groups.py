"""Configurations that differ in a key, and real rank groups that leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tpserve.engine.client import EngineClient
from tpserve.engine.config import EngineConfig


def with_(config: EngineConfig, **changes: Any) -> EngineConfig:
    """The same configuration but for some keys, checked again."""
    return EngineConfig(**{name: getattr(config, name) for name in config.field_names()} | changes)


@contextlib.contextmanager
def rank_group(config: EngineConfig, tp: int) -> Iterator[EngineClient]:
    """Ranks that must agree to the end, never be relaunched, and hold no block when they are done."""
    client = EngineClient(with_(config, tensor_parallel_size=tp, standby=False))  # none of them is replaced
    client.start()
    try:
        yield client
        ranks = client.status().ranks
        assert [rank.num_blocks_in_use for rank in ranks] == [0] * tp
        assert len({rank.checksum for rank in ranks}) == 1
        assert client.num_restarts == 0
    finally:
        client.close()
