"""Recording CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


def record(what: str, enqueue: Callable[[], None], pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """What `enqueue` launches, as a graph; nothing of it runs. None: there is no memory for one, and the same kernels
    have to be launched one by one. Other ranks need not have the same: what runs is, and in the same order.

    Args:
        what: for the log.
        enqueue: launches kernels; it has run on this stream before.
        pool: the memory that it allocates comes from here.
        stream: the current one.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads of the process may use the device while this one records.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            enqueue()
    except RuntimeError as e:  # torch's allocator's, or CUDA's own when the graph is made of what was recorded
        if "out of memory" not in str(e):
            raise
        logger.warning("no memory for the graph of %s: its kernels are launched one by one (%.200s)", what, e)
        return None
    return graph
