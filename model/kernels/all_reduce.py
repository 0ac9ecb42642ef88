"""Sums and gathers over the ranks inside a decode graph, without a barrier: data and flag travel in one word.

A 64-bit word is (epoch << 32 | float32 bits). The product that makes a partial sum stores its words straight into a
buffer of every rank (`push`); a second kernel on each rank spins on its own words until all carry this all-reduce's
epoch, adds them in rank order (so all ranks hold the same bits), adds the residual and leaves the next norm's sums.
An aligned 64-bit store is seen whole, so a word with the right epoch carries the right value: no fence is needed
between data and flag, because they are one.

Why a word is never overwritten before it is read. All-reduce i uses slot i % 2, and epochs count over the life of the
buffers, the same on all ranks: (steps so far) · (exchanges a step) + i. A rank stores words of i + 2 only after its
kernel that read i + 1 has ended: the pushing product waits for its predecessor (`gdc_wait`, or stream order), and so
for all before. That kernel saw *every* rank's words of i + 1, and each rank stored those after its own kernel that read
i had ended, by the same rule. So whoever is about to overwrite slot i % 2 knows that all ranks have read it. The
logits' gather has a region of its own and one exchange a step; between two of them lie the all-reduces of a step, which
order them in the same way. Epochs wrap after 2³² exchanges; a word then holds the previous lap's epoch of its slot,
2³² - 2 earlier or less, never the one awaited, unless a larger bucket left it unwritten for exactly a lap.

Why spinning cannot starve the work that it waits for. The reading kernel starts when every program of the pushing one
has at least begun (the rule of programmatic launches), so those hold their places on the device already; the other
ranks' products wait for nothing of ours but earlier exchanges.

Shape suffixes: S rows, D residual width, V vocabulary, N a rank's columns of it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.norm import Normed, store_normed
from tpserve.model.parallel import TensorParallel
from tpserve.model.reachable import reachable


@triton.jit
def push(peers_ptr, where, y, epoch, stored, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Stores float32 values as words of `epoch` at index `where` of every rank's buffer, the next rank's first."""
    word = (epoch.to(tl.int64) << 32) | (y.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
    for i in tl.static_range(RANKS):
        buffer = tl.load(peers_ptr + (RANK + 1 + i) % RANKS).to(tl.pointer_type(tl.int64))
        tl.store(buffer + where, word, mask=stored)


@triton.jit
def _all_there(words, wanted, epoch):
    return tl.min(tl.min((((words >> 32).to(tl.int32) == epoch) | (wanted == 0)).to(tl.int32), 1), 0)


@triton.jit
def _await(address, wanted, epoch):
    """Spins until every wanted word at `address`, [A, B], is of `epoch`; their float32 values, 0 for the others."""
    words = tl.load(address, mask=wanted, other=0, volatile=True)
    while _all_there(words, wanted, epoch) == 0:
        words = tl.load(address, mask=wanted, other=0, volatile=True)
    return words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["offset", "index", "per_step", "s"])
def _sum_kernel(
    words_ptr, step_ptr, gain_ptr, residual_ptr, x_ptr, sums_ptr, offset, index, per_step, s,
    D: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # It does not wait for the product: the words say when they are there. Steps were counted before that product began;
    # the residual was written before the words were, and is loaded behind them (by then visible in L2, hence .cg).
    if PDL:
        gdc_launch_dependents()
    part, m = tl.program_id(0), tl.program_id(1)
    cols = part * C + tl.arange(0, C)
    gain = tl.load(gain_ptr + cols).to(tl.float32)
    epoch = tl.load(step_ptr, cache_modifier=".cg") * per_step + index
    term = tl.arange(0, triton.next_power_of_2(TERMS))
    wanted = (term[:, None] < TERMS) & (cols[None, :] < D)
    terms = _await(words_ptr + offset + (term[:, None] * s + m) * D + cols[None, :], wanted, epoch)
    where = m * D + cols
    residual = tl.load(residual_ptr + where, cache_modifier=".cg") + tl.sum(terms, 0)
    store_normed(residual, where, gain, residual_ptr, x_ptr, sums_ptr + m * (D // C) + part)


@triton.jit(do_not_specialize=["offset", "index", "per_step"])
def _gather_kernel(words_ptr, step_ptr, logits_ptr, offset, index, per_step, V, C: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    cols = tl.program_id(0) * C + tl.arange(0, C)
    where = tl.program_id(1) * V + cols
    epoch = tl.load(step_ptr, cache_modifier=".cg") * per_step + index
    values = _await((words_ptr + offset + where)[None, :], (cols < V)[None, :], epoch)
    tl.store(logits_ptr + where, tl.sum(values, 0), mask=cols < V)


@triton.jit(do_not_specialize=["offset", "index", "per_step"])
def _push_matrix_kernel(
    y_ptr, peers_ptr, step_ptr, offset, index, per_step, n,
    C: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    where = tl.program_id(0) * C + tl.arange(0, C)
    y = tl.zeros([C], tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(y_ptr + part * n + where, mask=where < n, other=0.0).to(tl.float32)
    push(peers_ptr, offset + RANK * n + where, y, tl.load(step_ptr) * per_step + index, where < n, RANK, RANKS)


class WordExchange:
    """Buffers that every rank of a group may store words into, and the kernels that read them.

    Some collective must stand between making it and the first exchange, on this stream: nobody may store words before
    all have zeroed theirs.

    Args:
        tp: the group, of two ranks at least.
        device: of this rank.
        terms: words that one element of a sum may take at most: rows · partial sums a rank.
        dim: D.
        gathered: words of the largest gather, S · V.
        per_step: exchanges of one step.
        step: int32 [1], this rank's count of steps; all ranks count alike.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory.
    """

    def __init__(
        self,
        tp: TensorParallel,
        device: torch.device,
        *,
        terms: int,
        dim: int,
        gathered: int,
        per_step: int,
        step: torch.Tensor,
    ) -> None:
        self.tp, self.dim, self.terms, self.per_step, self.step = tp, dim, terms, per_step, step
        self._slot_words = terms * tp.size * dim
        self.gather_offset = 2 * self._slot_words
        # Of zeros: epoch 0, which no exchange has.
        self._words, self._handle = reachable(tp, self.gather_offset + gathered, dtype=torch.int64, device=device)
        self.peers = torch.tensor(list(self._handle.buffer_ptrs), dtype=torch.int64, device=device)

    def slot(self, index: int) -> int:
        """The first word of the slot that sum number `index` of a step uses."""
        # The sums of a step are even in number (two a layer): the slots alternate from step to step, too.
        return index % 2 * self._slot_words

    def push_matrix(self, y: torch.Tensor, index: int, *, pdl: bool) -> None:
        """Stores a partial sum that is in memory already.

        Args:
            y: [S, D], or [P, S, D]: P parts of it; contiguous.
        """
        n = y.shape[-2] * y.shape[-1]
        _push_matrix_kernel[(triton.cdiv(n, 1024),)](
            y, self.peers, self.step, self.slot(index), index, self.per_step, n,
            C=1024, PARTS=y.numel() // n, RANK=self.tp.rank, RANKS=self.tp.size, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip

    def add(self, into: Normed, gain_D: torch.Tensor, s: int, index: int, split: int, *, pdl: bool) -> int:
        """residual += the sum over ranks; returns the parts of the new sums of squares."""
        width = 64 if s == 1 else 128
        width = width if self.dim % width == 0 else self.dim & -self.dim
        _sum_kernel[(self.dim // width, s)](
            self._words, self.step, gain_D, into.residual_SD, into.x_SD, into.sums,
            self.slot(index), index, self.per_step, s,
            D=self.dim, TERMS=self.tp.size * split, C=width, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
        return self.dim // width

    def gather(self, logits_SV: torch.Tensor, index: int, *, pdl: bool) -> None:
        """Fills `logits_SV` with what the ranks pushed."""
        s, vocab_size = logits_SV.shape
        _gather_kernel[(triton.cdiv(vocab_size, 256), s)](
            self._words, self.step, logits_SV, self.gather_offset, index, self.per_step, vocab_size,
            C=256, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
