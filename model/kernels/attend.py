"""Attention of a decode step, one tile of keys: the inner part of `paged_attention.py`.

Keys and values are the left operands of the tensor cores, and a key/value head's few queries the right one: of these
the tensor cores take eight at least, of a left operand's rows sixteen.

Names are those of `paged_attention.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def beside_float8(q, CACHE: tl.constexpr):
    """Queries in the type that products are made in: float8 becomes float16 by one instruction for two."""
    if tl.float8e4nv == CACHE and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


@triton.jit
def _unpaired(v):
    """int16, two float8 each → float16 of the lower ones, float16 of the upper ones.

    Tensor cores want neighbouring tokens' values in one register, which no load brings together byte by byte at speed:
    two bytes at a time they are transposed as float16 would be.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 sorted;
        .reg .b16 lower, upper;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {lower, upper}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, lower;
        cvt.rn.f16x2.e4m3x2 $1, upper;
        }
        """,
        "=&r,=r,r", [v], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def attend(
    q, k_ptr, v_ptr, table_ptr, block, at, end, head, scale, best, total, acc, odd,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, PAIRED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys; WHOLE: all BN of them are there. Returns the next tile's block numbers, too."""
    n, e = tl.arange(0, BN), tl.arange(0, EP)
    pos = at + n
    there = pos < end
    offset = (block.to(OFFSET) * BLOCK + pos % BLOCK) * (K * E) + head * E
    block = tl.load(table_ptr + (pos + BN) // BLOCK, mask=pos + BN < end, other=0)
    if WHOLE and EP == E:
        k = tl.load(k_ptr + offset[:, None] + e[None, :])
    else:
        k = tl.load(k_ptr + offset[:, None] + e[None, :], mask=there[:, None] & (e[None, :] < E), other=0.0)
    if PAIRED:
        pair = tl.arange(0, EP // 2)
        v_at = v_ptr.to(tl.pointer_type(tl.int16)) + (offset // 2)[None, :] + pair[:, None]
        if WHOLE and EP == E:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=there[None, :] & (pair[:, None] < E // 2), other=0)
    elif WHOLE and EP == E:
        v = tl.load(v_ptr + offset[None, :] + e[:, None])
    else:
        v = tl.load(v_ptr + offset[None, :] + e[:, None], mask=there[None, :] & (e[:, None] < E), other=0.0)
    score = tl.dot(k.to(q.dtype), q, input_precision=PRECISION)
    if not WHOLE:
        score = tl.where(there[:, None], score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, 0) * scale)
    weight = tl.exp2(score * scale - new_best[None, :])
    fade = tl.exp2(best - new_best)
    total = total * fade + tl.sum(weight, 0)
    weight = weight.to(q.dtype)
    if PAIRED:
        lower, upper = _unpaired(v)
        acc = tl.dot(lower, weight, acc * fade[None, :])
        odd = tl.dot(upper, weight, odd * fade[None, :])
    else:
        acc = tl.dot(v.to(q.dtype), weight, acc * fade[None, :], input_precision=PRECISION)
    return block, new_best, total, acc, odd
