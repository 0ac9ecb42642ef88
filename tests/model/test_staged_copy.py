"""Copies through buffers say what plain copies say, whatever the slab's shape and type."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tpserve.model.staged_copy import StagedCopies, read_ahead


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


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    begun: list[int] = []
    busy, most = 0, 0
    lock = threading.Lock()

    def read(i: int) -> torch.Tensor:
        nonlocal busy, most
        with lock:
            begun.append(i)
            busy += 1
            most = max(most, busy)
        time.sleep(0.02 if i % 4 == 0 else 0.001)  # later ones are done first
        with lock:
            busy -= 1
        return torch.tensor(i)

    for i, result in enumerate(read_ahead([lambda i=i: read(i) for i in range(24)], 4)):  # type: ignore[misc]
        assert result.item() == i
        with lock:
            assert len(begun) <= i + 4
    assert i == 23
    assert 1 < most <= 4


def test_reading_ahead_ends_with_an_error_in_its_turn() -> None:
    begun: list[int] = []

    def read(i: int) -> torch.Tensor:
        begun.append(i)
        if i == 3:
            raise OSError("no such page")
        return torch.tensor(i)

    results = read_ahead([lambda i=i: read(i) for i in range(100)], 2)  # type: ignore[misc]
    assert [next(results).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no such page"):
        next(results)
    assert len(begun) <= 5


def test_slabs_are_read_and_copied_in_their_places() -> None:
    target = torch.zeros(10, 3)
    with StagedCopies(torch.device("cpu")) as copies:
        copies.read_and_copy([(target[i : i + 2], lambda i=i: torch.full((2, 3), float(i))) for i in range(0, 10, 2)])  # type: ignore[misc]
    assert target[:, 1].tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
