"""Greedy draws: each row's most probable token, written where the next step reads it, in one launch.

As the end of a decode step's graph it costs no launch of its own, and the step's rows and positions are there already.

Shape suffixes: S rows, V vocabulary; R, L as in `engine/rows.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

_COLUMNS = 2048  # of a program
_LOWEST = tl.constexpr(-(2**63))


class GreedyDraws:
    """Draws for up to `max_S` rows; one launch after the other, for they share their scratch.

    Args:
        max_S: rows.
        tokens_RL: int64, where tokens are written.

    Attributes:
        drawn_S: int64, the last launch's tokens; 0 for padding.
        most_S: float32, their logits.
    """

    def __init__(self, max_S: int, tokens_RL: torch.Tensor) -> None:
        device = tokens_RL.device
        self._tokens_RL = tokens_RL
        self.drawn_S = torch.zeros(max_S, dtype=torch.int64, device=device)
        self.most_S = torch.zeros(max_S, dtype=torch.float32, device=device)
        self._best_S = torch.full((max_S,), -(2**63), dtype=torch.int64, device=device)
        self._arrived_S = torch.zeros(max_S, dtype=torch.int32, device=device)

    def __call__(
        self,
        logits_SV: torch.Tensor,
        rows_S: torch.Tensor,
        positions_S: torch.Tensor,
        ahead: int = 0,
        *,
        pdl: bool = False,
    ) -> torch.Tensor:
        """The tokens, int64 [S], overwritten by the next call; of equal logits the lowest id.

        Args:
            logits_SV: float32, rows one behind the other.
            rows_S: int64.
            positions_S: int64; a token is written `ahead` places behind. Negative: padding, nothing is.
            pdl: programmatic dependent launch: starts while the kernel before still runs, for which it waits before it
                reads anything.
        """
        s, v = logits_SV.shape
        assert logits_SV.is_contiguous()
        _draw_kernel[(triton.cdiv(v, _COLUMNS), s)](
            logits_SV, rows_S, positions_S, self._tokens_RL, self.drawn_S, self.most_S, self._best_S,
            self._arrived_S, self._tokens_RL.stride(0), ahead, V=v, C=_COLUMNS, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
        return self.drawn_S[:s]


@triton.jit(do_not_specialize=["rows_ptr", "positions_ptr", "logits_ptr", "tokens_stride", "ahead"])
def _draw_kernel(
    logits_ptr, rows_ptr, positions_ptr, tokens_ptr, drawn_ptr, most_ptr, best_ptr, arrived_ptr, tokens_stride, ahead,
    V: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, s = tl.program_id(0), tl.program_id(1)
    cols = part * C + tl.arange(0, C)
    if PDL:
        gdc_wait()
    logit = tl.load(logits_ptr + s.to(tl.int64) * V + cols, mask=cols < V, other=float("-inf"))
    most = tl.max(logit, 0) + 0.0  # of two zeros none is larger
    first = tl.min(tl.where(logit == most, cols, V - 1), 0)  # a row of NaN: some token
    # As whole numbers floats are in order, but negative ones in reverse. The lower id is the larger number.
    bits = most.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.atomic_max(best_ptr + s, (order.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64), sem="relaxed")
    if tl.atomic_add(arrived_ptr + s, 1, sem="acq_rel", scope="gpu") != tl.num_programs(0) - 1:
        return
    best = tl.atomic_xchg(best_ptr + s, _LOWEST, sem="relaxed")
    tl.store(arrived_ptr + s, 0)
    order = (best >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    tl.store(most_ptr + s, bits.to(tl.float32, bitcast=True))
    position = tl.load(positions_ptr + s)
    token = tl.where(position >= 0, 0x7FFFFFFF - (best & 0x7FFFFFFF), 0)
    tl.store(drawn_ptr + s, token)
    tl.store(tokens_ptr + tl.load(rows_ptr + s) * tokens_stride + position + ahead, token, mask=position >= 0)
