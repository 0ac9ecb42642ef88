"""Copies through buffers say what plain copies say, whatever the slab's shape and type."""

from __future__ import annotations

import pytest
import torch

from tpserve.model.staged_copy import StagedCopies


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
