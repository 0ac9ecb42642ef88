"""Ranks that a test makes without torchrun."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_ranks(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Calls `function(rank, *args)` in so many processes; fails if one does. They are forks of a process that has
    imported torch once for all of them, and holds no lock and no thread of this one."""
    multiprocessing.set_forkserver_preload([function.__module__])
    mp.start_processes(function, args, nprocs, start_method="forkserver")
