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
def lane_groups(
    w_ptr, scale_ptr, group0, g, K: tl.constexpr, DEPTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """BK // 128 groups from g on of a program's 16 rows, in registers of the lanes that the tensor cores want them in:
    lane 4r + c has bytes 16c to 16c + 15 of a group's 64, of the rows r and r + 8. uint8 [32, P, 16] of either, and
    int64 [32, P] of either's scale and zero.
    """
    tl.static_assert(BN == 16)
    P: tl.constexpr = BK // 128
    first = tl.program_id(0) * BN
    lane, part, byte = tl.arange(0, 32), tl.arange(0, P), tl.arange(0, 16)
    row = first + lane // 4
    there = (g + part < DEPTH // 128)[None, :]
    at = (row.to(tl.int64) * (K // 2) + lane % 4 * 16)[:, None, None] + ((group0 + g + part) * 64)[None, :, None]
    w_at = w_ptr + at + byte[None, None, :]
    about = scale_ptr.to(tl.pointer_type(tl.int64)) + (group0 + g + part)[None, :] * ROWS + row[:, None]
    if DEPTH // 128 % P == 0:
        return tl.load(w_at), tl.load(w_at + 8 * (K // 2)), tl.load(about), tl.load(about + 8)
    return (
        tl.load(w_at, mask=there[:, :, None], other=0), tl.load(w_at + 8 * (K // 2), mask=there[:, :, None], other=0),
        tl.load(about, mask=there, other=0), tl.load(about + 8, mask=there, other=0),
    )  # fmt: skip


@triton.jit
def int4_by_lane(
    ahead, x_ptr, w_ptr, scale_ptr, group0, K: tl.constexpr, DEPTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`int4` for one row of x, groups of 128 and neighbouring rows of the weight, without shared memory: all that a
    program reads may be under way at once, the first part of it before the predecessor has ended.

    Which input is which along the tensor cores' K makes no difference as long as the weight and x agree: lane 4r + c
    takes the 16 bytes that lie together, and the same inputs of x.
    """
    P: tl.constexpr = BK // 128
    GROUPS: tl.constexpr = DEPTH // 128
    lane, part, byte = tl.arange(0, 32), tl.arange(0, P), tl.arange(0, 16)
    x_at = x_ptr + (group0 + part)[None, :, None] * 128 + (lane % 4 * 16)[:, None, None] + byte[None, None, :]
    y = tl.zeros([P, 16, 8], tl.float32)
    for g in tl.static_range(0, GROUPS, P):
        w0, w8, both0, both8 = ahead
        if g + P < GROUPS:
            ahead = lane_groups(w_ptr, scale_ptr, group0, g + P, K, DEPTH, BN, BK, ROWS)
        if GROUPS % P == 0:
            x_low, x_high = tl.load(x_at + g * 128), tl.load(x_at + g * 128 + 64)
        else:
            there = (g + part < GROUPS)[None, :, None]
            x_low = tl.load(x_at + g * 128, mask=there, other=0.0)
            x_high = tl.load(x_at + g * 128 + 64, mask=there, other=0.0)
        y += _sixteen_rows(w0, w8, both0, both8, _right_operand(x_low, P), _right_operand(x_high, P), P)
    return tl.max(tl.sum(y, 0), 1)[:, None]


@triton.jit
def _right_operand(x, P: tl.constexpr):
    """[32, P, 16] as of `lane_groups` → [P, 64, 8], the eight columns alike."""
    return tl.reshape(tl.permute(tl.reshape(x, [8, 4, P, 2, 8]), [2, 3, 1, 4, 0]), [P, 64, 8])


@triton.jit
def _sixteen_rows(w0, w8, both0, both8, x_low, x_high, P: tl.constexpr):
    """float32 [P, 16, 8]; see `lane_groups`."""
    w = tl.reshape(tl.join(w0, w8), [8, 4, P, 2, 8, 2])
    w = tl.reshape(tl.permute(w, [2, 5, 0, 3, 1, 4]), [P, 16, 64])
    both = tl.permute(tl.reshape(tl.join(both0, both8), [8, 4, P, 2]), [2, 3, 0, 1])
    both = tl.reshape(tl.broadcast_to(tl.expand_dims(both, 4), [P, 2, 8, 4, 2]), [P, 16, 8])
    scale, zero = _scale_and_zero(both)
    ones = _ones(w)
    x_sum = tl.dot(ones, x_high, tl.dot(ones, x_low))
    return tl.dot(_nibbles(w, True), x_high, tl.dot(_nibbles(w, False), x_low)) * scale + x_sum * zero


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
