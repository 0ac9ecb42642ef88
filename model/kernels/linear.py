"""Matrix products of a decode step: few rows of activations, so what counts is reading each weight once, at full speed.

Everything around a product (`product.py`) hides in its epilogue: the norm's 1/rms (a factor a sequence, `norm.py`),
rotary embedding and the write into the paged cache, SiLU and the product with it, the residual and the next norm's
sums, or the push to the other ranks (`all_reduce.py`).

Shape suffixes: S rows of the step (padded to the constant MP; rows beyond `s` are computed and not stored), N and K as
in y[S, N] = x[S, K] @ w[N, K]ᵀ, E head width, F feed-forward width, P parts of a norm's sum.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tpserve.model.kernels.all_reduce import WordExchange, push
from tpserve.model.kernels.norm import Normed, inverse_rms, load_sums
from tpserve.model.kernels.product import begin, pairs, product
from tpserve.model.kernels.rope import as_kept
from tpserve.model.kernels.tiles import Stream, Tile
from tpserve.model.matrix import Matrix


@triton.jit(do_not_specialize=["s"])
def _qkv_kernel(
    x_ptr, sums_ptr, w_ptr, scale_ptr, q_ptr, k_ptr, v_ptr, rope_ptr, positions_ptr, slots_ptr, s,
    K: tl.constexpr, H: tl.constexpr, KV: tl.constexpr, E: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = pid * BN + tl.arange(0, BN)
    mm = tl.arange(0, MP)
    head = pid * BN // E
    position = tl.load(positions_ptr + mm, mask=mm < s, other=-1)  # of the step's input: there before it began
    # Values are not rotated: an angle of 0 for them.
    pair = pid * BN % E + 2 * tl.arange(0, BN // 2)
    rotates = (position >= 0)[None, :] & (pair[:, None] < E) & (head < H + KV)
    angle = rope_ptr + position[None, :] * E + pair[:, None]
    cos = tl.load(angle, mask=rotates, other=1.0)
    sin = tl.load(angle + 1, mask=rotates, other=0.0)
    last = s - 1 if GROUP != 0 else MP - 1  # buffers have MP rows, and reading all needs no mask
    ahead = begin(w_ptr, scale_ptr, cols, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS, PREFETCH, EARLY, PDL)
    slot = tl.load(slots_ptr + mm, mask=mm < s, other=-1)
    sums = load_sums(sums_ptr, P, MP)
    y = product(ahead, x_ptr, w_ptr, scale_ptr, cols, last, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS)
    y = y * inverse_rms(sums, K, EPS)[None, :]
    even, odd = pairs(y, BN, MP)
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    y = tl.reshape(tl.permute(rotated, [0, 2, 1]), [BN, MP]).to(q_ptr.dtype.element_ty)
    if head < H:
        tl.store(q_ptr + mm[None, :] * (H * E) + cols[:, None], y, mask=mm[None, :] < s)
    elif head < H + KV:
        where = k_ptr + slot[None, :] * (KV * E) + (cols - H * E)[:, None]
        tl.store(where, as_kept(y, k_ptr.dtype.element_ty), mask=slot[None, :] >= 0)
    else:
        where = v_ptr + slot[None, :] * (KV * E) + (cols - (H + KV) * E)[:, None]
        tl.store(where, as_kept(y, v_ptr.dtype.element_ty), mask=slot[None, :] >= 0)


@triton.jit(do_not_specialize=["s"])
def _gate_up_kernel(
    x_ptr, sums_ptr, w_ptr, scale_ptr, y_ptr, s,
    K: tl.constexpr, F: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Even rows of the tile are the gate's, odd ones the up projection's, F further down.
    j = tl.arange(0, BN)
    col = tl.program_id(0) * (BN // 2) + j // 2
    rows = tl.minimum(col, F - 1) + F * (j % 2)
    last = s - 1 if GROUP != 0 else MP - 1
    ahead = begin(w_ptr, scale_ptr, rows, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS, PREFETCH, EARLY, PDL)
    sums = load_sums(sums_ptr, P, MP)
    y = product(ahead, x_ptr, w_ptr, scale_ptr, rows, last, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS)
    gate, up = pairs(y * inverse_rms(sums, K, EPS)[None, :], BN, MP)
    y = gate / (1.0 + tl.exp(-gate)) * up
    cols = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    mm = tl.arange(0, MP)
    stored = (mm[None, :] < s) & (cols[:, None] < F)
    tl.store(y_ptr + mm[None, :] * F + cols[:, None], y.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["s"])
def _residual_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, gain_ptr, y_ptr, sums_ptr, s,
    K: tl.constexpr, N: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    cols = pid * BN + tl.arange(0, BN)
    gain = tl.load(gain_ptr + cols).to(tl.float32)
    last = s - 1 if GROUP != 0 else MP - 1
    ahead = begin(w_ptr, scale_ptr, cols, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS, PREFETCH, EARLY, PDL)
    mm = tl.arange(0, MP)
    where = mm[None, :] * N + cols[:, None]
    stored = mm[None, :] < s
    residual = tl.load(residual_ptr + where, mask=stored, other=0.0)
    residual += product(ahead, x_ptr, w_ptr, scale_ptr, cols, last, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS)
    tl.store(residual_ptr + where, residual, mask=stored)
    tl.store(y_ptr + where, (residual * gain[:, None]).to(y_ptr.dtype.element_ty), mask=stored)
    tl.store(sums_ptr + mm * (N // BN) + pid, tl.sum(residual * residual, 0), mask=mm < s)


@triton.jit(do_not_specialize=["offset", "index", "per_step", "s"])
def _push_kernel(
    x_ptr, w_ptr, scale_ptr, peers_ptr, step_ptr, offset, index, per_step, s,
    K: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SPLIT: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    DEPTH: tl.constexpr = K // SPLIT
    last = s - 1 if GROUP != 0 else MP - 1
    ahead = begin(w_ptr, scale_ptr, cols, part * DEPTH, K, DEPTH, MP, BN, BK, STAGES, GROUP, ROWS, PREFETCH, EARLY, PDL)
    epoch = tl.load(step_ptr) * per_step + index
    y = product(ahead, x_ptr, w_ptr, scale_ptr, cols, last, part * DEPTH, K, DEPTH, MP, BN, BK, STAGES, GROUP, ROWS)
    mm = tl.arange(0, MP)
    where = offset + ((RANK * SPLIT + part) * s + mm[None, :]) * N + cols[:, None]
    push(peers_ptr, where, y, epoch, (mm[None, :] < s) & (cols[:, None] < N), RANK, RANKS)


@triton.jit(do_not_specialize=["offset", "index", "per_step", "s"])
def _logits_kernel(
    x_ptr, sums_ptr, w_ptr, scale_ptr, y_ptr, peers_ptr, step_ptr, offset, index, per_step, s,
    K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, P: tl.constexpr, EPS: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(cols, N - 1)
    last = s - 1 if GROUP != 0 else MP - 1
    ahead = begin(w_ptr, scale_ptr, rows, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS, PREFETCH, EARLY, PDL)
    sums = load_sums(sums_ptr, P, MP)
    y = product(ahead, x_ptr, w_ptr, scale_ptr, rows, last, 0, K, K, MP, BN, BK, STAGES, GROUP, ROWS)
    y = y * inverse_rms(sums, K, EPS)[None, :]
    mm = tl.arange(0, MP)
    where = mm[None, :] * STRIDE + FIRST + cols[:, None]
    stored = (mm[None, :] < s) & (cols[:, None] < N)
    if RANKS > 1:
        push(peers_ptr, offset + where, y, tl.load(step_ptr) * per_step + index, stored, RANK, RANKS)
    else:
        tl.store(y_ptr + where, y, mask=stored)


MAX_ROWS = 8  # beyond, cuBLAS is as fast as the best of these tiles were (at 16, 32 and 64 rows on an H200: 1 to 2%)


def padded_rows(s: int) -> int:
    """MP: rows that the kernels compute for `s` sequences, at most `MAX_ROWS`; their inputs need as many."""
    return 1 if s == 1 else MAX_ROWS


# `stream_linear` is imported where it is used: Gluon is not in every Triton (`has_gluon`).
def _launch(
    kernel: Any, tile: Tile, programs: int, s: int, pdl: bool, x: torch.Tensor | Normed, w: Matrix,
    *args: Any, **constants: Any,
) -> None:  # fmt: skip
    mp = padded_rows(s)
    prefetch = min(tile.prefetch, 1 << ((w.row_bytes // tile.split).bit_length() - 1))  # nothing beyond a row's end
    inputs = (x.x_SD, x.sums) if isinstance(x, Normed) else (x,)
    kernel[(programs, tile.split)](
        *inputs, w.q, w.q if w.scale is None else w.scale, *args, s, **constants,
        MP=mp, BN=tile.rows, BK=tile.depth, STAGES=tile.stages, GROUP=w.group, ROWS=w.shape[0],
        PREFETCH=prefetch if prefetch >= 128 else 0,
        EARLY=tile.early, PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip


def qkv(
    normed: Normed,
    parts: int,
    w_ND: Matrix,
    q_SHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    rope_PC2: torch.Tensor,
    positions_S: torch.Tensor,
    slots_S: torch.Tensor,
    s: int,
    tile: Tile | Stream,
    *,
    pdl: bool,
) -> None:
    """Rotated queries to `q_SHE`, rotated keys and values to the cache slots `slots_S` (-1: nowhere).

    Args:
        normed, parts: the input and how many parts its sums have.
        w_ND: the rows of wq, wk and wv, one below the other.
        s: rows of the step.
        tile: its rows divide E.
    """
    if isinstance(tile, Stream):
        from tpserve.model.kernels import stream_linear

        stream_linear.qkv(normed, parts, w_ND, q_SHE, k_cache, v_cache, rope_PC2, positions_S, slots_S, tile, pdl=pdl)
        return
    (n, d), (_, h, e) = w_ND.shape, q_SHE.shape
    _launch(
        _qkv_kernel, tile, n // tile.rows, s, pdl,
        normed, w_ND, q_SHE, k_cache, v_cache, rope_PC2, positions_S, slots_S,
        K=d, H=h, KV=k_cache.shape[1], E=e, P=parts, EPS=normed.eps,
    )  # fmt: skip


def gate_up(
    normed: Normed, parts: int, w_ND: Matrix, y_SF: torch.Tensor, s: int, tile: Tile | Stream, *, pdl: bool
) -> None:
    """SiLU(x @ w1ᵀ) · (x @ w3ᵀ); `w_ND` is w1 above w3."""
    if isinstance(tile, Stream):
        from tpserve.model.kernels import stream_linear

        stream_linear.gate_up(normed, parts, w_ND, y_SF, tile, pdl=pdl)
        return
    n, d = w_ND.shape
    _launch(
        _gate_up_kernel, tile, triton.cdiv(n, tile.rows), s, pdl,
        normed, w_ND, y_SF,
        K=d, F=n // 2, P=parts, EPS=normed.eps,
    )  # fmt: skip


def add_product(
    x_SK: torch.Tensor, w_DK: Matrix, into: Normed, gain_D: torch.Tensor, s: int, tile: Tile | Stream, *, pdl: bool
) -> int:
    """residual += x @ wᵀ; returns the parts of the new sums of squares. The tile's rows divide D."""
    if isinstance(tile, Stream):
        from tpserve.model.kernels import stream_linear

        return stream_linear.add_product(x_SK, w_DK, into, gain_D, tile, pdl=pdl)
    d, k = w_DK.shape
    _launch(
        _residual_kernel, tile, d // tile.rows, s, pdl,
        x_SK, w_DK, into.residual_SD, gain_D, into.x_SD, into.sums,
        K=k, N=d,
    )  # fmt: skip
    return d // tile.rows


def push_product(
    x_SK: torch.Tensor, w_DK: Matrix, exchange: WordExchange, s: int, index: int, tile: Tile | Stream, *, pdl: bool
) -> None:
    """x @ wᵀ as `tile.split` terms of sum number `index` of the step; `WordExchange.add` makes the sum."""
    if isinstance(tile, Stream):
        from tpserve.model.kernels import stream_linear

        stream_linear.push_product(x_SK, w_DK, exchange, index, tile, pdl=pdl)
        return
    d, k = w_DK.shape
    _launch(
        _push_kernel, tile, d // tile.rows, s, pdl,
        x_SK, w_DK, exchange.peers, exchange.step, exchange.slot(index), index, exchange.per_step,
        K=k, N=d, RANK=exchange.tp.rank, RANKS=exchange.tp.size, SPLIT=tile.split,
    )  # fmt: skip


def logits(
    normed: Normed,
    parts: int,
    w_VD: Matrix,
    y_SV: torch.Tensor,
    s: int,
    tile: Tile,
    exchange: WordExchange | None,
    first: int,
    index: int,
    *,
    pdl: bool,
) -> None:
    """x @ wᵀ in float32, to `y_SV`; with an exchange, as columns from `first` on of what the ranks gather."""
    n, d = w_VD.shape
    stride = y_SV.shape[1]
    words = (y_SV, y_SV, 0, 0, 0) if exchange is None else (
        exchange.peers, exchange.step, exchange.gather_offset, index, exchange.per_step
    )  # fmt: skip
    _launch(
        _logits_kernel, tile, triton.cdiv(n, tile.rows), s, pdl,
        normed, w_VD, y_SV, *words,
        K=d, N=n, STRIDE=stride, FIRST=first, P=parts, EPS=normed.eps,
        RANK=0 if exchange is None else exchange.tp.rank, RANKS=1 if exchange is None else exchange.tp.size,
    )  # fmt: skip
