"""Compiles many kernels at a time: Triton compiles at a kernel's first launch, one after the other.

Inside `compiled_together` no kernel is launched (what one left out would have written, the next would read); those that
are not compiled yet are noted. When it ends, all that were noted are compiled by a pool of threads: Triton lets go of
the interpreter's lock for most of it. What runs there must not look at what kernels compute. The noted come from
Triton's own hook, which hands out what `JITFunction.preload` takes; `run` is told to warm up only.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from tpserve.model.parallel import TensorParallel

MAX_THREADS = 16

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def compiled_together(device: torch.device, tp: TensorParallel) -> Iterator[None]:
    """See above; a kernel that does not compile so is left for its first launch.

    Args:
        device: of the kernels.
        tp: the ranks that do the same at the same time. Each begins with another part of the kernels, and finds the
            others' in Triton's cache on disk, where they share one.
    """
    noted: dict[tuple[int, str], tuple[Any, str]] = {}

    def note(*, fn, compile, **_rest) -> bool:
        data = compile["specialization_data"]
        noted[id(fn.jit_function), data] = (fn.jit_function, data)
        return True  # not now

    def only_warm_up(self, *args, grid, warmup, **kwargs):
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    run, before = triton.runtime.JITFunction.run, triton.knobs.runtime.jit_cache_hook
    triton.runtime.JITFunction.run, triton.knobs.runtime.jit_cache_hook = only_warm_up, note
    try:
        yield
    finally:
        triton.runtime.JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, before
    # Ranks of other machines are few enough not to matter here.
    threads = max(1, min(MAX_THREADS, len(noted), (os.cpu_count() or 1) // tp.size))
    every = list(noted.values())
    own = every[tp.rank :: tp.size]
    # Shares one after the other, not all at once: by the time of the others' they are on disk.
    others = [kernel for i, kernel in enumerate(every) if i % tp.size != tp.rank]
    with ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for share in (own, others):
            for function, done in [(function, pool.submit(function.preload, data)) for function, data in share]:
                if done.exception() is not None:
                    logger.info("%s is compiled when it is first used: %s", function.__name__, done.exception())
