"""Copies through buffers say what plain copies say, whatever the slab's shape and type."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from tpserve.model.staged_copy import THREADS, StagedCopies, in_threads


@pytest.mark.parametrize("rows", [1, 3, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_arrive_whole(rows: int, dtype: torch.dtype) -> None:
    whole = torch.randn(50, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
    target = torch.full((60, 40), 7.0, dtype=dtype)
    with StagedCopies(torch.device("cpu"), buffer_bytes=100 * 40 * 2) as copies:
        copies.stage(target[5:55, :33], whole[:, 20:53], rows)  # a slab of columns, into a part of a larger matrix
        copies.stage(target[:2, 38], whole[:2, 0], rows)  # a vector
    assert torch.equal(target[5:55, :33], whole[:, 20:53].to(dtype))
    assert torch.equal(target[:2, 38], whole[:2, 0].to(dtype))
    target[5:55, :33], target[:2, 38] = 7.0, 7.0
    assert (target == 7.0).all(), "written beside the slab"


def test_on_a_cpu_nothing_is_staged() -> None:
    copies, target = StagedCopies(torch.device("cpu"), buffer_bytes=1), torch.zeros(3)
    copies.copy(target, torch.arange(3))
    copies.finish()
    assert target.tolist() == [0, 1, 2]


def test_jobs_are_all_done_by_several_threads_that_torch_leaves_alone() -> None:
    done: list[int] = []
    threads: set[str] = set()
    both = threading.Barrier(2)

    def job(i: int) -> None:
        if i < 2:
            both.wait(20)  # the second one begins while the first one runs
        done.append(i)
        threads.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        in_threads(partial(job, i) for i in range(100))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert sorted(done) == list(range(100))
    assert 1 < len(threads) <= THREADS


def test_the_first_error_ends_it() -> None:
    begun: list[int] = []

    def job(i: int) -> None:
        begun.append(i)
        if i in (3, 4):
            raise OSError(f"no page {i}")

    with pytest.raises(OSError, match="no page 3"):
        in_threads(partial(job, i) for i in range(1000))
    assert len(begun) <= 3 + 2 * THREADS + 1


def test_every_thread_has_buffers_of_its_own() -> None:
    """Two copies at a time: neither sees the other's numbers."""
    copies = StagedCopies(torch.device("cpu"), buffer_bytes=4096)
    targets = torch.zeros(40, 64, 32)

    def job(i: int) -> None:
        for _ in range(20):
            copies.stage(targets[i], torch.full((64, 32), float(i)), 4)

    in_threads(partial(job, i) for i in range(40))
    assert (targets == torch.arange(40.0)[:, None, None]).all()
