"""Rows of an int4 weight times x: the inner part of `product.py` for groups of inputs that share a scale and a zero.

A byte holds the inputs j and j + GROUP / 2 of a group (`quantized.in_halves`), so both halves meet x as it lies. The
tensor cores multiply 128 + q, which bits make without a conversion; what the 128 add is in the zeros (`Int4Linear`),
which are multiplied by the sum of x. The tensor cores make that sum, too, by a weight of ones: so it is where it is
needed. Of one row of x they have eight copies.

Names are those of `product.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int4(
    x_ptr, w_ptr, scale_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BK // GROUP groups of inputs at a time, one below the other: with as many warps, each warp has one to itself, and
    nothing passes between warps before the end.
    """
    COLUMNS: tl.constexpr = max(MP, 8)
    PARTS: tl.constexpr = BK // GROUP
    HALF: tl.constexpr = GROUP // 2
    GROUPS: tl.constexpr = DEPTH // GROUP
    PAIRED: tl.constexpr = MP == 1 and HALF >= 32 and PARTS > 1  # how x lies while it is read
    tl.static_assert(BK % GROUP == 0 and DEPTH % GROUP == 0)
    part, byte, mm = tl.arange(0, PARTS), tl.arange(0, HALF), tl.arange(0, MP)
    group = k0 // GROUP + part
    if PARTS > 1:
        w_at = w_ptr + rows.to(tl.int64)[None, :, None] * (K // 2) + (group * HALF)[:, None, None] + byte[None, None, :]
        if PAIRED:
            x_at = x_ptr + (group * GROUP)[:, None] + _paired(HALF)[None, :]
        else:
            x_at = x_ptr + mm[None, None, :] * K + (group * GROUP)[:, None, None] + byte[None, :, None]
        about = scale_ptr.to(tl.pointer_type(tl.int64)) + group[:, None] * ROWS + rows[None, :]
        x_there = (mm <= last)[None, None, :]
        y = tl.zeros([PARTS, BN, COLUMNS], tl.float32)
    else:  # many rows of x: warps share the weight's rows instead
        w_at = w_ptr + rows.to(tl.int64)[:, None] * (K // 2) + k0 // 2 + byte[None, :]
        x_at = x_ptr + mm[None, :] * K + k0 + byte[:, None]
        about = scale_ptr.to(tl.pointer_type(tl.int64)) + k0 // GROUP * ROWS + rows
        x_there = (mm <= last)[None, :]
        y = tl.zeros([BN, COLUMNS], tl.float32)
    for g in tl.range(0, GROUPS, PARTS, num_stages=STAGES):
        if GROUPS % PARTS == 0:
            w = tl.load(w_at + g * HALF)
            both = tl.load(about + g * ROWS)
            there = x_there
        else:
            part_there = g + part < GROUPS
            w = tl.load(w_at + g * HALF, mask=part_there[:, None, None], other=0)
            both = tl.load(about + g * ROWS, mask=part_there[:, None], other=0)
            there = part_there[:, None] if PAIRED else part_there[:, None, None] & x_there
        if MP == 1 and GROUPS % PARTS == 0:
            x_low = tl.load(x_at + g * GROUP)
            x_high = tl.load(x_at + g * GROUP + HALF)
        else:
            x_low = tl.load(x_at + g * GROUP, mask=there, other=0.0)
            x_high = tl.load(x_at + g * GROUP + HALF, mask=there, other=0.0)
        if PAIRED:
            x_low, x_high = _unpaired(x_low, PARTS, HALF), _unpaired(x_high, PARTS, HALF)
        elif MP == 1:
            x_low, x_high = _eight_columns(x_low, PARTS, HALF), _eight_columns(x_high, PARTS, HALF)
        scale, zero = _scale_and_zero(both)
        ones = _ones(w)
        x_sum = tl.dot(ones, x_high, tl.dot(ones, x_low))
        products = tl.dot(_nibbles(w, True), x_high, tl.dot(_nibbles(w, False), x_low))
        y += products * tl.expand_dims(scale, -1)
        y += x_sum * tl.expand_dims(zero, -1)
    if PARTS > 1:
        y = tl.sum(y, 0)
    if MP == 1:
        y = tl.max(y, 1)[:, None]
    return y


@triton.jit
def _paired(HALF: tl.constexpr):
    """Inputs in the order in which the tensor cores' lanes take them, two and two: what a lane reads of x lies together
    and is multiplied as it was read."""
    t = tl.arange(0, HALF)
    return t // 32 * 32 + t // 2 % 2 * 16 + t // 8 % 4 * 4 + t // 4 % 2 * 2 + t % 2


@triton.jit
def _unpaired(x, PARTS: tl.constexpr, HALF: tl.constexpr):
    """[P, H] in the order of `_paired` → [P, H, 8] in that of the weight, the eight columns alike."""
    x = tl.permute(tl.reshape(x, [PARTS, HALF // 32, 4, 2, 2, 2]), [0, 1, 4, 2, 3, 5])
    return tl.broadcast_to(tl.reshape(x, [PARTS, HALF, 1]), [PARTS, HALF, 8])


@triton.jit
def _eight_columns(x, PARTS: tl.constexpr, HALF: tl.constexpr):
    if PARTS > 1:
        x = tl.broadcast_to(x, [PARTS, HALF, 8])
    else:
        x = tl.broadcast_to(x, [HALF, 8])
    return x


@triton.jit
def _scale_and_zero(both):
    """Two float32 of an int64: one load for two, and not two that reach for every other word."""
    return (both & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _nibbles(w, HIGH: tl.constexpr):
    """bfloat16 128 + q of bytes' low or high four bits: below the exponent of 2^7, by a permutation of bytes."""
    SHIFT: tl.constexpr = "shr.b32 q, $2, 4; and.b32 q, q, 0x0F0F0F0F;" if HIGH else "and.b32 q, $2, 0x0F0F0F0F;"
    return tl.inline_asm_elementwise(
        "{ .reg .b32 q; " + SHIFT + "prmt.b32 $0, q, 0x43434343, 0x4140; prmt.b32 $1, q, 0x43434343, 0x4342; }",
        "=&r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _ones(w):
    """bfloat16 ones in the registers that `_nibbles` has its results in: a constant would be laid out otherwise."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, 0x3F803F80; mov.b32 $1, 0x3F803F80;", "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4
    )
