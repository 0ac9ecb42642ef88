"""Compiles many kernels at a time: Triton compiles at a kernel's first launch, one after the other.

Inside `compiled_together` no kernel is launched (what one left out would have written, the next would read); those that
are not compiled yet are noted. When it ends, all that were noted are compiled, by forks of this process, which leave
them in Triton's cache on disk: threads take turns at what is Python (7B's 72 kernels took 16 of them 11 to 12 s, where
one thread of another machine takes 27). What runs inside must not look at what kernels compute. The noted come from
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

from tpserve.model.forks import do_in_forks
from tpserve.model.parallel import TensorParallel

MAX_PROCESSES = 16

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
    processes = max(1, min(MAX_PROCESSES, len(noted), (os.cpu_count() or 1) // tp.size))
    every = list(noted.values())
    for function, _ in every:
        # Triton finds a kernel on disk by what it calls, as far as it has looked at that before: all have to look in
        # one order, every fork, rank and start.
        function.cache_key  # noqa: B018
    own = every[tp.rank :: tp.size]
    # Shares one after the other, not all at once: by the time of the others' they are on disk.
    others = [kernel for i, kernel in enumerate(every) if i % tp.size != tp.rank]
    # Those of Gluon take longest, up to 3 s: they are begun with. An earlier start leaves all on disk, or none.
    own.sort(key=lambda kernel: not kernel[0].is_gluon())
    if processes > 1 and own and not _was_on_disk(own[-1]):
        _compile_in_forks(own[:-1], processes)
    with ThreadPoolExecutor(processes, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        for share in (own, others):  # from disk; what is not there is compiled here and now
            for function, done in [(function, pool.submit(function.preload, data)) for function, data in share]:
                if done.exception() is not None:
                    logger.info("%s is compiled when it is first used: %s", function.__name__, done.exception())


def _was_on_disk(kernel: tuple[Any, str]) -> bool:
    """Compiles one, unless an earlier start has left it there."""
    hits: list[bool] = []
    function, data = kernel
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda *, cache_hit, **_rest: hits.append(cache_hit)
    try:
        with contextlib.suppress(Exception):  # told of when its turn comes
            function.preload(data)
    finally:
        triton.knobs.compilation.listener = before
    return hits == [True]


def _compile_in_forks(kernels: list[tuple[Any, str]], processes: int) -> None:
    """Leaves kernels in Triton's cache on disk, as far as that can be done."""
    index = triton.runtime.driver.active.get_current_device()

    def compile_one(i: int) -> None:
        triton.runtime.driver.active.get_current_device = lambda: index  # a fork cannot ask CUDA
        function, data = kernels[i]
        function.preload(data)

    try:
        do_in_forks(compile_one, len(kernels), processes)
    except OSError as e:
        logger.info("kernels are compiled by threads: %s", e)
