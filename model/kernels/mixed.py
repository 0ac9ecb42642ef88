"""Products of many rows with weights of any number of bits.

int8 and int4, where there is nothing faster (`tens_of_rows.py`): up to `MAX_MIXED_ROWS` rows a step is bound by reading
weights, and a kernel widens them as it reads (`product.py`); beyond, they are widened to bfloat16 in memory first, for
cuBLAS: a pass over the weights, next to products that are bound by the processors. float8 weights are multiplied by
float8 activations, which have a scale a row, by torch, where 16 divides their sizes.

Shape suffixes: T rows, N and K as in y[T, N] = x[T, K] @ w[N, K]ᵀ.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpserve.model.kernels.product import product
from tpserve.model.matrix import ROW_SCALES, Matrix

MAX_MIXED_ROWS = 128
_FLOAT8 = torch.float8_e4m3fn


@triton.jit(do_not_specialize=["t"])
def _product_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, t, K: tl.constexpr, N: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    cols, mm = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * MP + tl.arange(0, MP)
    rows = tl.minimum(cols, N - 1)
    first = tl.program_id(1) * MP
    last = tl.minimum(t - first, MP) - 1
    y = product(0, x_ptr + first * K, w_ptr, scale_ptr, rows, last, 0, K, K, MP, BN, BK, STAGES, GROUP, N)
    where = y_ptr + mm[None, :].to(tl.int64) * N + cols[:, None]
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(mm[None, :] < t) & (cols[:, None] < N))


@triton.jit
def _widen_kernel(
    q_ptr, scale_ptr, out_ptr, N, K: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    there = (rows < N)[:, None]
    out = out_ptr + rows.to(tl.int64)[:, None] * K + k0 + tl.arange(0, BK)[None, :]
    if GROUP > 0:
        tl.static_assert(BK == GROUP // 2 and K % GROUP == 0)
        group, high = k0 // GROUP, k0 % GROUP // BK
        w = tl.load(q_ptr + rows.to(tl.int64)[:, None] * (K // 2) + group * BK + tl.arange(0, BK)[None, :], mask=there)
        about = scale_ptr + (group * N + rows) * 2
        scale, zero = tl.load(about, mask=rows < N, other=0.0), tl.load(about + 1, mask=rows < N, other=0.0)
        q = ((w >> (4 * high).to(tl.uint8)) & 15).to(tl.float32)
        w = (q + 128.0) * scale[:, None] + zero[:, None]
        tl.store(out, w.to(out_ptr.dtype.element_ty), mask=there)
    else:
        at = k0 + tl.arange(0, BK)
        w = tl.load(q_ptr + rows.to(tl.int64)[:, None] * K + at[None, :], mask=there & (at < K)[None, :])
        w = w.to(tl.float32) * tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
        tl.store(out, w.to(out_ptr.dtype.element_ty), mask=there & (at < K)[None, :])


@triton.jit
def _to_float8_kernel(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, KP: tl.constexpr):
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 0)
    scale = tl.where(most > 0, most / 448.0, 1.0)
    x = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(out_ptr + row * K + k, x.to(tl.float8e4nv), mask=k < K)
    tl.store(scale_ptr + row, scale)


def matmul(x_TK: torch.Tensor, w: Matrix, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    """x @ wᵀ.

    Args:
        x_TK: contiguous; with weights of fewer bits, bfloat16.
        w: the weight.
        out_TN: where to, contiguous; None: new memory.
    """
    (n, k), t = w.shape, len(x_TK)
    if w.scale is None:
        return torch.mm(x_TK, w.q.t(), out=out_TN) if out_TN is not None else x_TK @ w.q.t()
    if out_TN is None:
        out_TN = x_TK.new_empty(t, n)
    if w.q.dtype == _FLOAT8 and n % 16 == 0 and k % 16 == 0:
        x8_TK, scale_T1 = x_TK.new_empty(t, k, dtype=_FLOAT8), x_TK.new_empty(t, 1, dtype=torch.float32)
        _to_float8_kernel[(t,)](x_TK, x8_TK, scale_T1, K=k, KP=triton.next_power_of_2(k), num_warps=8)
        return torch._scaled_mm(
            x8_TK, w.q.t(), scale_a=scale_T1, scale_b=w.scale[None], out_dtype=x_TK.dtype, out=out_TN
        )
    if t <= MAX_MIXED_ROWS:
        mp = min(64, max(16, triton.next_power_of_2(t)))
        rows, depth, warps, stages = _tile(mp, w.group)
        _product_kernel[(triton.cdiv(n, rows), triton.cdiv(t, mp))](
            x_TK, w.q, w.scale, out_TN, t, K=k, N=n, MP=mp, BN=rows, BK=depth, STAGES=stages, GROUP=w.group,
            num_warps=warps,
        )  # fmt: skip
        return out_TN
    return torch.mm(x_TK, _widened(w, x_TK.dtype).t(), out=out_TN)


def _tile(mp: int, group: int) -> tuple[int, int, int, int]:
    """(rows and depth of the weight's tile, warps, stages)."""
    part = group if group > 0 else 128
    return (32, 4 * part, 4, 3) if mp <= 16 else (64, part, 4, 4)  # as many parts as leave the sums in registers


def _widened(w: Matrix, dtype: torch.dtype) -> torch.Tensor:
    (n, k), rows = w.shape, 16
    depth = 256 if w.group == ROW_SCALES else w.group // 2
    out_NK = torch.empty(n, k, dtype=dtype, device=w.q.device)
    _widen_kernel[(triton.cdiv(n, rows), triton.cdiv(k, depth))](
        w.q, w.scale, out_NK, n, K=k, GROUP=w.group, BN=rows, BK=depth, num_warps=4
    )
    return out_NK
