"""Weights of 8 and 4 bits as the tensor cores' left operand, bfloat16 in registers: of `rows_product.py`'s tiles.

What has one scale a row is scaled behind the product. Of int4, a tile has two groups of 128 inputs; a byte holds the
inputs j and j + 64 of a group (`quantized.in_halves`), so that the low halves of a tile's bytes are one operand, the
high ones another. Numbers are made around 8, which bfloat16 holds exactly, and then scaled and moved, rounded once;
scales and zeros are rounded to bfloat16 before.

Shape suffixes: N output features of the weight.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tpserve.model.kernels.block_copies import barrier
from tpserve.model.kernels.rows_tile import INT4_GROUP

GROUP = gl.constexpr(INT4_GROUP)
_CHUNK = gl.constexpr(16)  # groups whose scales are asked for together
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _number(n, first, other, STEP: gl.constexpr, BN: gl.constexpr):
    """Which of the weight's rows row n of a tile is: one half's follow `first`, the other's `other`."""
    return gl.where(n < BN // 2, first + n * STEP, other + (n - BN // 2) * STEP)


@gluon.jit
def scaled(acc, scale_ptr, first, other, N: gl.constexpr, STEP: gl.constexpr, BN: gl.constexpr):
    """Sums times the scales of their rows; arguments: `_number`."""
    n = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
    return acc * gl.load(scale_ptr + gl.minimum(_number(n, first, other, STEP, BN), N - 1))[:, None]


@gluon.jit
def in_bfloat16(tile, SUMS: gl.constexpr, BN: gl.constexpr, DEPTH: gl.constexpr):
    """A weight's tile of 8 bits, as the tensor cores' left operand: a lane's registers hold two neighbours each, which
    lie in two bytes. int8 as in `product.in_bfloat16`."""
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 1)
    two = tile._reinterpret(gl.int16, [BN, DEPTH // 2], gl.NVMMASharedLayout(128, 16, 2)).load(PAIRS)
    if tile.dtype == gl.int8:
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            cvt.u32.u16 a, $2;
            prmt.b32 a, a, 0x43434343, 0x4140;
            and.b32 b, a, 0xFF80FF80;
            and.b32 a, a, 0xFF7FFF7F;
            sub.rn.bf16x2 a, a, b;
            mov.b32 {$0, $1}, a;
            }
            """,
            "=h,=h,h", [two], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            cvt.rn.f16x2.e4m3x2 a, $2;
            and.b32 b, a, 0x80008000;
            and.b32 a, a, 0x7FFF7FFF;
            shr.u32 a, a, 3;
            or.b32 a, a, b;
            mov.b32 b, 0x77807780;
            mul.rn.bf16x2 a, a, b;
            mov.b32 {$0, $1}, a;
            }
            """,
            "=h,=h,h", [two], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    both = gl.join(low, high).reshape([BN, DEPTH])
    return gl.convert_layout(both, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)


@gluon.jit
def group_scales(
    scale_ptr, first, other, group, K: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, BN: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Scales and zeros of a tile's rows in shared memory, int32 [STEPS, 2, BN]: two bfloat16 a word, a step having two
    groups, from number `group` on. Rows: `_number`."""
    CHUNK: gl.constexpr = min(_CHUNK, triton.next_power_of_2(2 * STEPS))
    CHUNKS: gl.constexpr = (2 * STEPS + CHUNK - 1) // CHUNK
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps() * 32 // BN, BN // 32], [1, 0])
    table = gl.allocate_shared_memory(gl.int32, [CHUNKS, CHUNK, BN], _PLAIN)
    n = _number(gl.arange(0, BN, gl.SliceLayout(0, LANES)), first, other, STEP, BN)
    for chunk in gl.static_range(CHUNKS):
        at = group + chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, LANES))
        where = scale_ptr.to(gl.pointer_type(gl.int64), bitcast=True) + at[:, None] * N + gl.minimum(n, N - 1)[None, :]
        both = gl.load(where, mask=(at < K // GROUP)[:, None] & (n >= 0)[None, :], other=0)
        scale = (both & 0xFFFFFFFF).to(gl.int32).to(gl.float32, bitcast=True)
        zero = (both >> 32).to(gl.int32).to(gl.float32, bitcast=True) + 136.0 * scale  # what 8 stands for
        scale = scale.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32)
        zero = zero.to(gl.bfloat16).to(gl.uint16, bitcast=True).to(gl.int32)
        table.index(chunk).store(scale | (zero << 16))
    barrier()
    return table._reinterpret(gl.int32, [CHUNKS * CHUNK // 2, 2, BN], _PLAIN)


@gluon.jit
def nibbles_in_bfloat16(tile, scales, SUMS: gl.constexpr, BN: gl.constexpr):
    """The two operands, [BN, 128] each, of a tile of bytes [BN, 128] and its scales, [2, BN] of `group_scales`."""
    PAIRS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 1)
    two = tile._reinterpret(gl.int16, [BN, 64], gl.NVMMASharedLayout(128, 16, 2)).load(PAIRS).reshape([BN, 2, 32])
    both = scales.permute((1, 0)).load(gl.SliceLayout(2, two.type.layout))
    scale, zero = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;",
        "=&r,=r,r", [both], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    low, low_after, high, high_after = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c;
        cvt.u32.u16 a, $4;
        prmt.b32 a, a, 0, 0x4140;
        shr.b32 b, a, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 c, 0x43084308;
        sub.rn.bf16x2 a, a, c;
        sub.rn.bf16x2 b, b, c;
        fma.rn.bf16x2 a, a, $5, $6;
        fma.rn.bf16x2 b, b, $5, $6;
        mov.b32 {$0, $1}, a;
        mov.b32 {$2, $3}, b;
        }
        """,
        "=h,=h,=h,=h,h,r,r", [two, scale.expand_dims(2), zero.expand_dims(2)],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=1,
    )  # fmt: skip
    return _operand(low, low_after, SUMS, BN), _operand(high, high_after, SUMS, BN)


@gluon.jit
def _operand(even, odd, SUMS: gl.constexpr, BN: gl.constexpr):
    both = gl.join(even, odd).reshape([BN, 128])
    return gl.convert_layout(both, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
