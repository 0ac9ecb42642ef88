"""The inner part of the products of a decode step: one program owns BN rows of a weight and streams them.

With one sequence it multiplies and adds in float32 and reduces once at the end; with up to 8 the weight is the left
operand of the tensor cores. Weights of fewer bits are widened in registers.

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
    MP: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    PREFETCH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What need not wait for the predecessor, and the wait. Returns `product`'s first tile, where it takes one."""
    PACK: tl.constexpr = _pack(GROUP, MP)
    if PREFETCH > 0:
        lines = tl.arange(0, PREFETCH // 128) * 128
        SIZE: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
        address = w_ptr.to(tl.int64) + (rows.to(tl.int64) * K + k0)[:, None] // PACK * SIZE + lines[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    if MP == 1 and STAGES == 1:
        if GROUP > 0:
            tl.static_assert(K == DEPTH, "int4 rows are not split")
            ahead = _load_words(w_ptr, rows, 0, K, DEPTH, BK, GROUP)
        else:
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


@triton.constexpr_function
def _pack(group, mp):
    """Inputs in an element of the weight's pointer: words of eight for one row of x, bytes of two for several."""
    return 1 if group <= 0 else 8 if mp == 1 else 2


@triton.jit
def product(
    ahead, x_ptr, w_ptr, scale_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """float32 [BN, MP]: the weight's rows times x, over K from k0 on.

    last: of the rows of x that there are; GROUP and scale_ptr: see `Matrix`; ROWS: of the whole weight.
    """
    if GROUP > 0:
        if MP == 1:
            y = _int4_row(ahead, x_ptr, w_ptr, scale_ptr, rows, K, DEPTH, BN, BK, STAGES, GROUP, ROWS)
        else:
            y = _int4_rows(x_ptr, w_ptr, scale_ptr, rows, last, k0, K, DEPTH, MP, BN, BK, STAGES, GROUP, ROWS)
    else:
        if MP == 1:
            y = _one_row(ahead, x_ptr, w_ptr, rows, k0, K, DEPTH, BN, BK, STAGES)
        else:
            y = _some_rows(x_ptr, w_ptr, rows, last, k0, K, DEPTH, MP, BN, BK, STAGES)
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
        y = tl.dot(w if w.dtype == x.dtype else widened(w).to(x.dtype), x, y)
    return y


@triton.jit
def _load_words(w_ptr, rows, at, K: tl.constexpr, DEPTH: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """Words of eight weights, [BN, groups, words of a group]."""
    group, word = tl.arange(0, BK // GROUP), tl.arange(0, GROUP // 8)
    where = at // 8 + (group * (GROUP // 8))[:, None] + word[None, :]
    there = at // GROUP + group < DEPTH // GROUP
    w_rows = w_ptr + rows.to(tl.int64)[:, None, None] * (K // 8)
    return tl.load(w_rows + where[None, :, :], mask=there[None, :, None], other=0)


@triton.jit
def _int4_row(
    ahead, x_ptr, w_ptr, scale_ptr, rows, K: tl.constexpr, DEPTH: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = BK // GROUP
    sums = tl.zeros([BN, GROUPS], tl.float32)
    x_pairs = x_ptr.to(tl.pointer_type(tl.int32))
    word = (tl.arange(0, GROUPS) * (GROUP // 8))[:, None] + tl.arange(0, GROUP // 8)[None, :]
    for k in tl.range(0, DEPTH, BK, num_stages=STAGES):
        group = k // GROUP + tl.arange(0, GROUPS)
        there = group < DEPTH // GROUP
        if STAGES == 1:
            w = ahead
            ahead = _load_words(w_ptr, rows, k + BK, K, DEPTH, BK, GROUP)
        else:
            w = _load_words(w_ptr, rows, k, K, DEPTH, BK, GROUP)
        about = scale_ptr + (group[None, :] * ROWS + rows[:, None]) * 2
        scale = tl.load(about, mask=there[None, :], other=0.0)
        zero = tl.load(about + 1, mask=there[None, :], other=0.0)
        part = tl.zeros([BN, GROUPS, GROUP // 8], tl.float32)
        x_sum = tl.zeros([GROUPS, GROUP // 8], tl.float32)
        for j in tl.static_range(4):
            # Two bfloat16 a word of x; the weights beside them are the word's bits from 8 j on.
            pair = tl.load(x_pairs + (k // 8 + word) * 4 + j, mask=there[:, None], other=0)
            even = (pair << 16).to(tl.float32, bitcast=True)
            odd = (pair & -65536).to(tl.float32, bitcast=True)
            x_sum += even + odd
            half = w if j < 2 else w >> 16
            part += _four_bits(half, 8 * (j % 2)) * even[None, :, :]
            part += _four_bits(half, 8 * (j % 2) + 4) * odd[None, :, :]
        sums += scale * tl.sum(part, 2) + zero * tl.sum(x_sum, 1)[None, :]
    return tl.sum(sums, 1)[:, None]


@triton.jit
def _four_bits(w, BIT: tl.constexpr):
    """float32 of the four bits from BIT on (0, 4, 8 or 12), left where they are: at the end of a mantissa whose
    exponent makes them units; two instructions, and no conversion of an integer (see `widened`)."""
    power = tl.constexpr((150 - BIT) << 23)  # 2^(23 - BIT)
    bits = (w & (15 << BIT)) | power
    return bits.to(tl.float32, bitcast=True) - tl.constexpr(2.0 ** (23 - BIT))


@triton.jit
def _int4_rows(
    x_ptr, w_ptr, scale_ptr, rows, last, k0, K: tl.constexpr, DEPTH: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * (K // 2) + k0 // 2
    x_cols = x_ptr + tl.minimum(tl.arange(0, MP), last)[None, :] * K + k0
    y = tl.zeros([BN, MP], tl.float32)
    for k in tl.range(0, DEPTH, GROUP, num_stages=STAGES):
        at = k // 2 + tl.arange(0, GROUP // 2)
        kk = k + tl.arange(0, GROUP)
        if DEPTH % GROUP == 0:
            w = tl.load(w_rows + at[None, :])
            x = tl.load(x_cols + kk[:, None])
        else:
            w = tl.load(w_rows + at[None, :], mask=at[None, :] < DEPTH // 2, other=0)
            x = tl.load(x_cols + kk[:, None], mask=kk[:, None] < DEPTH, other=0.0)
        where = scale_ptr + ((k0 + k) // GROUP * ROWS + rows) * 2
        scale, zero = tl.load(where), tl.load(where + 1)
        q = tl.reshape(tl.join(w & 15, w >> 4), [BN, GROUP]).to(x.dtype)
        y += tl.dot(q, x) * scale[:, None] + zero[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
    return y


@triton.jit
def pairs(y, BN: tl.constexpr, MP: tl.constexpr):
    """[BN, MP] → its even and its odd rows, [BN/2, MP] each."""
    return tl.split(tl.permute(tl.reshape(y, [BN // 2, 2, MP]), [0, 2, 1]))
