"""Sum over the ranks, residual add and norm of some hundred rows, in one kernel: a rank does it for its share of rows.

Program p of every rank has one row of its rank's share. It reads that row's partial sums from all ranks' memory, adds
them to the residual stream, of which a rank keeps its share only, and stores the normed row into all ranks' memory.
Before and after it meets program p of the others: before, so that their products have ended; after, so that the rows
have arrived, and nobody's partial sums are written anew while they are read.

Meeting: a rank stores the program's count of meetings into a flag of its own in each other rank's memory (release), and
waits until the others' flags in its own memory say the same (acquire). A flag is not overwritten before it is read: who
stores the next start has passed the end, for which it needed our end, which we say after we have read its start; and
likewise from end to end. All ranks launch the same programs in the same order, so their counts agree, also in graphs.
Programs wait for those of the same index only, and devices begin them in the order of their indices: of the lowest
index that has not ended, all ranks' programs are on their devices, whether or not all of a launch have a place there.

Shape suffixes: S rows of the step, D residual width.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tpserve.model.parallel import TensorParallel
from tpserve.model.reachable import reachable

MAX_PROGRAMS = 512  # as many flags; 1,024 rows on two ranks


@triton.jit
def _meet(flags_ptr, at, count, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Says `count` at index `at` to all other ranks, and waits for theirs; flags_ptr: addresses of the ranks' flags."""
    tl.debug_barrier()  # what all threads have stored is stored before one of them says so
    rank = tl.arange(0, triton.next_power_of_2(RANKS))
    others = (rank < RANKS) & (rank != RANK)
    theirs = tl.load(flags_ptr + rank, mask=others, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(theirs + at * RANKS + RANK, count + rank * 0, mask=others, sem="release", scope="sys")
    own = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + at * RANKS + rank
    missing = RANKS
    while missing > 0:
        said = tl.atomic_add(own, rank * 0, mask=others, sem="acquire", scope="sys")
        missing = tl.sum((others & (said != count)).to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["s", "share"])
def _kernel(
    partials_ptr, xs_ptr, flags_ptr, counts_ptr, residual_ptr, gain_ptr, s, share,
    D: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, d = tl.program_id(0), tl.arange(0, DP)
    inside = d < D
    gain = tl.load(gain_ptr + d, mask=inside, other=0.0)
    count = tl.load(counts_ptr + program) + 1
    _meet(flags_ptr, program, count, RANK, RANKS)
    row = RANK * share + program
    where = row.to(tl.int64) * D + d
    mask = inside & (row < s)
    residual = tl.load(residual_ptr + where, mask=mask, other=0.0)
    for i in tl.static_range(RANKS):
        partial = tl.multiple_of(tl.load(partials_ptr + i).to(tl.pointer_type(gain.dtype)), 16)
        residual += tl.load(partial + where, mask=mask, other=0.0, cache_modifier=".cv").to(tl.float32)
    tl.store(residual_ptr + where, residual, mask=mask)
    scale = tl.rsqrt(tl.sum(residual * residual, 0) / D + EPS)
    x = (residual * scale * gain.to(tl.float32)).to(gain.dtype)
    for i in tl.static_range(RANKS):
        theirs = tl.multiple_of(tl.load(xs_ptr + (RANK + i) % RANKS).to(tl.pointer_type(gain.dtype)), 16)
        tl.store(theirs + where, x, mask=mask)
    _meet(flags_ptr, PROGRAMS + program, count, RANK, RANKS)
    tl.store(counts_ptr + program, count)


class RowExchange:
    """Buffers that all ranks of a group reach, and the kernel.

    Args:
        tp: the group, of two ranks at least.
        rows: of the largest step.
        dim: D.
        dtype: of partial sums and normed rows.
        device: of this rank.

    Attributes:
        partial_SD: where a rank puts its partial sums.
        x_SD: the normed rows, all of them on every rank.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory.
    """

    def __init__(self, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._tp, self._rows = tp, rows
        self._handles: list[Any] = []

        def shared(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            tensor, handle = reachable(tp, *shape, dtype=dtype, device=device)
            self._handles.append(handle)
            return tensor, torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)

        self._programs = -(-rows // tp.size)
        self.partial_SD, self._partials = shared(rows, dim, dtype=dtype)
        self.x_SD, self._xs = shared(rows, dim, dtype=dtype)
        self._flags_2PR, self._flags = shared(2, self._programs, tp.size, dtype=torch.int32)
        self._counts_P = torch.zeros(self._programs, dtype=torch.int32, device=device)

    @classmethod
    def make(
        cls, tp: TensorParallel, rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> RowExchange | None:
        """None on one rank, for too many rows, and, on all ranks alike, where one cannot reach another's memory."""
        if tp.size == 1 or device.type != "cuda" or rows > MAX_PROGRAMS * tp.size:
            return None
        return tp.made_by_all(lambda: cls(tp, rows, dim, dtype, device), device)

    def fits(self, rows: int) -> bool:
        """Whether a step of so many rows is no larger than the largest."""
        return rows <= self._rows

    def add_norm(self, residual_SD: torch.Tensor, gain_D: torch.Tensor, eps: float, s: int) -> torch.Tensor:
        """residual += the sum of the first `s` rows of the ranks' `partial_SD`; RMSNorm of it to `x_SD`.

        Args:
            residual_SD: float32; this rank's share of the rows is read and written.
            gain_D: of the norm.
            eps: of the norm.
            s: rows.
        """
        dim, share = self.x_SD.shape[1], -(-s // self._tp.size)
        _kernel[(share,)](
            self._partials, self._xs, self._flags, self._counts_P, residual_SD, gain_D, s, share,
            D=dim, DP=triton.next_power_of_2(dim), EPS=eps, RANK=self._tp.rank, RANKS=self._tp.size,
            PROGRAMS=self._programs, num_warps=8,
        )  # fmt: skip
        return self.x_SD[:s]
