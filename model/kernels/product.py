"""The inner part of the products of a decode step: one program owns BN rows of a weight and streams them.

With one sequence it multiplies and adds in float32 and reduces once at the end; with up to 8 the weight is the left
operand of the tensor cores.

Programmatic dependent launch overlaps a kernel's start with its predecessor's end. The rule that keeps it right: before
`gdc_wait` a kernel reads only weights and the step's input; it waits before reading anything that a step writes. A
kernel that has waited knows that its predecessor has ended, and so, one by one, that all before it have.

K: the depth of the product, DEPTH: one program's part of it; MP: rows of x, padded.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _load_weights(w_ptr, rows, k0, at, K: tl.constexpr, DEPTH: tl.constexpr, BK: tl.constexpr):
    kk = at + tl.arange(0, BK)
    return tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + (k0 + kk)[None, :], mask=kk[None, :] < DEPTH, other=0.0)


@triton.jit
def begin(
    w_ptr, rows, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What need not wait for the predecessor, and the wait. Returns `product`'s first tile, where it takes one."""
    if PREFETCH > 0:
        lines = tl.arange(0, PREFETCH // 128) * 128
        address = w_ptr.to(tl.int64) + (rows.to(tl.int64) * K + k0)[:, None] * 2 + lines[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    if MP == 1 and STAGES == 1:
        ahead = _load_weights(w_ptr, rows, k0, 0, K, DEPTH, BK)
    else:
        ahead = 0
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    return ahead


@triton.jit
def product(
    ahead, x_ptr, w_ptr, rows, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [BN, MP]: the weight's rows times x, over K from k0 on."""
    EVEN: tl.constexpr = DEPTH % BK == 0
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K + k0
    if MP == 1:
        sums = tl.zeros([BN, BK], tl.float32)
        for k in tl.range(0, DEPTH, BK, num_stages=STAGES):
            kk = k + tl.arange(0, BK)
            if STAGES == 1:  # two tiles in registers: the one multiplied and the one under way
                w = ahead
                ahead = _load_weights(w_ptr, rows, k0, k + BK, K, DEPTH, BK)
            elif EVEN:
                w = tl.load(w_rows + kk[None, :])
            else:
                w = tl.load(w_rows + kk[None, :], mask=kk[None, :] < DEPTH, other=0.0)
            if EVEN:
                x = tl.load(x_ptr + k0 + kk)
            else:
                x = tl.load(x_ptr + k0 + kk, mask=kk < DEPTH, other=0.0)
            sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
        y = tl.sum(sums, 1)[:, None]
    else:
        x_cols = x_ptr + tl.arange(0, MP)[None, :] * K + k0
        y = tl.zeros([BN, MP], tl.float32)
        for k in tl.range(0, DEPTH, BK, num_stages=STAGES):
            kk = k + tl.arange(0, BK)
            if EVEN:
                w = tl.load(w_rows + kk[None, :])
                x = tl.load(x_cols + kk[:, None])
            else:
                w = tl.load(w_rows + kk[None, :], mask=kk[None, :] < DEPTH, other=0.0)
                x = tl.load(x_cols + kk[:, None], mask=kk[:, None] < DEPTH, other=0.0)
            y = tl.dot(w, x, y)
    return y


@triton.jit
def pairs(y, BN: tl.constexpr, MP: tl.constexpr):
    """[BN, MP] → its even and its odd rows, [BN/2, MP] each."""
    return tl.split(tl.permute(tl.reshape(y, [BN // 2, 2, MP]), [0, 2, 1]))
