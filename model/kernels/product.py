"""The inner part of the products of a decode step: one program owns BN rows of a weight and streams them.

With one sequence it multiplies and adds in float32 and reduces once at the end; with up to 8, and for int4 always, the
weight is the left operand of the tensor cores. Weights of fewer bits are widened in registers. One sequence's products
with int4 weights have kernels of their own (`stream.py`), where these are not for them.

Programmatic dependent launch overlaps a kernel's start with its predecessor's end. The rule that keeps it right: before
`gdc_wait` a kernel reads only weights and the step's input; it waits before reading anything that a step writes. A
kernel that has waited knows that its predecessor has ended, and so, one by one, that all before it have. Two
exceptions: attention reads its items, of prompts its tiles, before (who made them had ended before the embedding had,
and so before the first product began), and the embedding waits at its end (`deal`, in front of it, was launched
normally, and has nothing to do with what it reads and writes).

K: the depth of the product, DEPTH: one program's part of it; MP: rows of x, padded.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.int4 import int4


@triton.jit
def _load_weights(w_ptr, rows, k0, at, K: tl.constexpr, DEPTH: tl.constexpr, BK: tl.constexpr):
    kk = at + tl.arange(0, BK)
    return tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + (k0 + kk)[None, :], mask=kk[None, :] < DEPTH, other=0.0)


@triton.jit
def begin(
    w_ptr, scale_ptr, rows, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What need not wait for the predecessor, and the wait. Returns `product`'s first tile, where it takes one."""
    PACK: tl.constexpr = 2 if GROUP > 0 else 1  # inputs in an element of the weight's pointer
    if PREFETCH > 0:
        lines = tl.arange(0, PREFETCH // 128) * 128
        SIZE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
        address = w_ptr.to(tl.int64) + (rows.to(tl.int64) * K + k0)[:, None] // PACK * SIZE + lines[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    if MP == 1 and STAGES == 1 and GROUP <= 0:
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
    ahead, x_ptr, w_ptr, scale_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32 [BN, MP]: the weight's rows times x, over K from k0 on.

    last: of the rows of x that there are; what comes out beyond it means nothing. GROUP and scale_ptr: see `Matrix`;
    ROWS: of the whole weight.
    """
    if GROUP > 0:
        y = int4(x_ptr, w_ptr, scale_ptr, rows, last, k0, K, DEPTH, MP, BN, BK, STAGES, GROUP, ROWS)
    else:
        if MP == 1:
            y = _one_row(ahead, x_ptr, w_ptr, rows, k0, K, DEPTH, BN, BK, STAGES)
        elif GROUP == 0:
            y = _some_rows(x_ptr, w_ptr, rows, last, k0, K, DEPTH, MP, BN, BK, STAGES)
        else:
            y = _widened_rows(x_ptr, w_ptr, rows, last, k0, K, DEPTH, MP, BN, BK, STAGES)
        if GROUP < 0:
            y *= tl.load(scale_ptr + rows)[:, None]
    return y


@triton.jit
def _one_row(
    ahead, x_ptr, w_ptr, rows, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = DEPTH % BK == 0
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K + k0
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
        sums += widened(w) * x.to(tl.float32)[None, :]
    return tl.sum(sums, 1)[:, None]


@triton.jit
def widened(w):
    """Weights in float32.

    Integers are not converted, which few of the processor's lanes can do at a time. A byte b below the exponent of 2^23
    is 2^23 + b, by one permutation of bytes; 2^23 + 128 taken off leaves q = b - 128, exactly.
    """
    if w.dtype == tl.int8:
        w = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 b;
            xor.b32 b, $4, 0x80808080;
            prmt.b32 $0, b, 0x4B000000, 0x7440;
            prmt.b32 $1, b, 0x4B000000, 0x7441;
            prmt.b32 $2, b, 0x4B000000, 0x7442;
            prmt.b32 $3, b, 0x4B000000, 0x7443;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [w], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    return w.to(tl.float32)


@triton.jit
def in_bfloat16(w):
    """Weights in bfloat16, exactly.

    An integer has seven bits and a sign of weight -128. Below the exponent of 2^7 the seven are 128 + them, and the
    eighth, which is the exponent's last, makes 128 or 256: what is taken off.
    """
    if w.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d;
            prmt.b32 a, $2, 0x43434343, 0x4140;
            prmt.b32 b, $2, 0x43434343, 0x4342;
            and.b32 c, a, 0xFF7FFF7F;
            and.b32 d, b, 0xFF7FFF7F;
            and.b32 a, a, 0xFF80FF80;
            and.b32 b, b, 0xFF80FF80;
            sub.rn.bf16x2 $0, c, a;
            sub.rn.bf16x2 $1, d, b;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return w.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _some_rows(
    x_ptr, w_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = DEPTH % BK == 0
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K + k0
    x_cols = x_ptr + tl.minimum(tl.arange(0, MP), last)[None, :] * K + k0
    y = tl.zeros([BN, MP], tl.float32)
    for k in tl.range(0, DEPTH, BK, num_stages=STAGES):
        kk = k + tl.arange(0, BK)
        if EVEN:
            w = tl.load(w_rows + kk[None, :])
            x = tl.load(x_cols + kk[:, None])
        else:
            w = tl.load(w_rows + kk[None, :], mask=kk[None, :] < DEPTH, other=0.0)
            x = tl.load(x_cols + kk[:, None], mask=kk[:, None] < DEPTH, other=0.0)
        y = tl.dot(w, x, y, input_precision="ieee")  # of float32; the others have no choice
    return y


@triton.jit
def _widened_rows(
    x_ptr, w_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """int8 and float8: as `int4`, 128 inputs where that has a group."""
    PART: tl.constexpr = 128
    PARTS: tl.constexpr = BK // PART
    tl.static_assert(BK % PART == 0)
    part, byte, mm = tl.arange(0, PARTS), tl.arange(0, PART), tl.arange(0, MP)
    if PARTS > 1:
        at = part[:, None] * PART + byte[None, :]
        w_at = w_ptr + rows.to(tl.int64)[None, :, None] * K + k0 + at[:, None, :]
        x_at = x_ptr + mm[None, None, :] * K + k0 + at[:, :, None]
        x_there = (mm <= last)[None, None, :]
        y = tl.zeros([PARTS, BN, MP], tl.float32)
    else:
        at = byte
        w_at = w_ptr + rows.to(tl.int64)[:, None] * K + k0 + at[None, :]
        x_at = x_ptr + mm[None, :] * K + k0 + at[:, None]
        x_there = (mm <= last)[None, :]
        y = tl.zeros([BN, MP], tl.float32)
    for k in tl.range(0, DEPTH, BK, num_stages=STAGES):
        if DEPTH % BK == 0:
            w = tl.load(w_at + k)
            x = tl.load(x_at + k, mask=x_there, other=0.0)
        else:
            there = k + at < DEPTH
            w = tl.load(w_at + k, mask=tl.expand_dims(there, -2), other=0.0)
            x = tl.load(x_at + k, mask=x_there & tl.expand_dims(there, -1), other=0.0)
        y = tl.dot(in_bfloat16(w), x, y)
    if PARTS > 1:
        y = tl.sum(y, 0)
    return y


@triton.jit
def pairs(y, BN: tl.constexpr, MP: tl.constexpr):
    """[BN, MP] → its even and its odd rows, [BN/2, MP] each."""
    return tl.split(tl.permute(tl.reshape(y, [BN // 2, 2, MP]), [0, 2, 1]))
