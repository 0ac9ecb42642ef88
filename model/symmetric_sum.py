"""Sums over the ranks in memory that all of them reach: torch's two-shot all-reduce.

Between the words of `kernels/all_reduce.py`, which are faster for a few rows, and NCCL, which is for thousands. Each
rank adds up its share of the elements, reading the others' memory, and writes the sums into theirs; so all hold the
same bits. It begins and ends with a barrier: the buffer may be written again as soon as the sum has been read.

Shape suffixes: T tokens, D residual width.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tpserve.model.parallel import TensorParallel


class SymmetricSum:
    """One buffer a rank, and its sums.

    Args:
        tp: the group, of two ranks at least.
        rows: of the largest sum.
        dim: D.
        dtype: of what is summed.
        device: of this rank.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory.
    """

    def __init__(self, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        # Multicast objects are not needed, and creating them can disturb other users of the switch.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        from torch.distributed import _symmetric_memory as symmetric_memory

        assert tp.group is not None
        self._group = tp.group.group_name
        self._buffer_TD = symmetric_memory.empty(rows, dim, dtype=dtype, device=device)
        self._buffer_TD.zero_()
        symmetric_memory.rendezvous(self._buffer_TD, tp.group)

    @classmethod
    def make(
        cls, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> SymmetricSum | None:
        """None on a single rank, and, on all ranks alike, where one cannot reach another's memory."""
        if tp.size == 1 or device.type != "cuda":
            return None
        made, ok = None, torch.ones(1, device=device)
        try:
            made = cls(tp, rows, dim, dtype, device)
        except RuntimeError:
            ok.zero_()
        dist.all_reduce(ok, dist.ReduceOp.MIN, group=tp.group)
        return made if ok.item() else None

    def fits(self, rows: int) -> bool:
        """Whether a sum of so many rows is made here."""
        return rows <= len(self._buffer_TD)

    def buffer(self, rows: int) -> torch.Tensor:
        """Where a rank puts what it adds, [rows, D]; always the same memory."""
        return self._buffer_TD[:rows]

    def sum(self, y_TD: torch.Tensor) -> torch.Tensor:
        """Adds up the ranks' `buffer`s, in place; good until the next product is put there."""
        torch.ops.symm_mem.two_shot_all_reduce_(y_TD, "sum", self._group)
        return y_TD
