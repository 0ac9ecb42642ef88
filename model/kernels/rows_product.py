"""Products of some tens of rows on Hopper: x @ wᵀ, where reading w once is most of the time.

The weight's rows are the left operand of the tensor cores and the step's the right one, so that no lane works for rows
that are not there. Tiles of both come by the copy engine into a ring; the weight's first ones are asked for before the
kernel in front has ended. A program has a tile of the output, or, so that all processors have as much to read, a part
of its sum: parts are left for the next kernel to add, which reads the output anyway.

Shape suffixes: S rows of the step, N output and K input features, P parts.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import dataclasses

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.block_copies import barrier
from tpserve.model.matrix import Matrix

MAX_ROWS = 64  # with more, cuBLAS is faster, but for
_FEWEST_OF_MANY, MOST_ROWS = 112, 128
_SPAN = gl.constexpr(128)  # bytes of a weight's row in a tile: as far as the copy engine swaps banks
_BYTES = gl.constexpr(2)  # of a row's number
_ROOM = 225 << 10  # bytes of a processor's shared memory
_MAX_ENTRIES = 12
_FEWEST, _MOST = 0.7, 2.75  # programs, of the processors: fewer would not keep the memory busy
_MOST_OF_BYTES = 3


@dataclasses.dataclass(frozen=True)
class RowsTile:
    """How a product is cut.

    Attributes:
        rows: of the weight.
        parts: of its sums.
        entries: of the ring.
    """

    rows: int
    parts: int
    entries: int


def choose_rows_tile(
    S: int, N: int, K: int, processors: int, *, itemsize: int = 2, in_parts: bool = False, with_end: bool = False
) -> RowsTile | None:
    """As measured on an H200, with 7B's shapes; None: cuBLAS is the way.

    Args:
        S: of the step.
        N, K: of the weight.
        processors: of the device.
        itemsize: bytes of the weight's numbers.
        in_parts: whether the sums may be left in parts.
        with_end: whether the product saves SiLU's pass over twice its outputs.
    """
    depth, most = _SPAN.value // itemsize, _MOST if itemsize > 1 else _MOST_OF_BYTES
    # With many rows, large tiles, which read them less often, if all run at a time with a processor each.
    large = most * processors < N // 64 or (
        itemsize > 1 and S > 32 and not in_parts and _FEWEST * processors <= N // 128 <= processors
    )  # fmt: skip
    rows = 128 if large else 64
    if not _suits(S, itemsize > 1 and (in_parts or with_end)) or N % rows or K * itemsize % 16:
        return None
    tiles, steps = N // rows, -(-K // depth)  # beyond the end come zeros
    parts = 1
    if in_parts:
        each = 2 if S <= 32 or processors // tiles * tiles < _FEWEST * processors else 1
        each += itemsize == 1  # widening waits for tiles, and for it the tensor cores
        parts = max(1, min(each * processors // tiles, steps // 3))
    programs = tiles * parts
    entry = rows * _SPAN.value + padded(S) * depth * _BYTES.value
    entries = min(_MAX_ENTRIES, _ROOM // -(-programs // processors) // entry, steps // parts)  # all run at a time
    if entries < 3 or not _FEWEST * processors <= programs <= most * processors:
        return None
    return RowsTile(rows, parts, entries)


def _suits(S: int, saves: bool) -> bool:
    """Above 64, 128 rows are computed of any number: that pays where it is not many more, and something is saved."""
    return 0 < S <= MAX_ROWS or (saves and _FEWEST_OF_MANY <= S <= MOST_ROWS)


def padded(S: int) -> int:
    """Rows that are computed for S."""
    return max(16, 1 << (S - 1).bit_length())


def warps(tile: RowsTile) -> int:
    """Of a program: four, which multiply together, for each 64 rows of the weight."""
    return tile.rows // 16


def descriptor(matrix: torch.Tensor, rows: int, of: torch.Tensor | None = None) -> TensorDescriptor:
    """For copies of so many rows of a matrix, whose columns are contiguous, and as many columns as a tile of `of` has;
    None: of the matrix."""
    bits = 8 * matrix.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    depth = _SPAN.value // (matrix if of is None else of).element_size()
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, depth], layout)


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
def _copy_weight(w_desc, other_desc, ws, full, slot, row, k, BN: gl.constexpr, HALVES: gl.constexpr):
    """Of a tile, BN rows, or as many halves of it."""
    DEPTH: gl.constexpr = w_desc.block_shape[1]
    tile, arrived = ws.index(slot), full.index(slot)
    if HALVES == 1:
        tma.async_copy_global_to_shared(w_desc, [row, k * DEPTH], arrived, tile)
    else:
        tma.async_copy_global_to_shared(w_desc, [row, k * DEPTH], arrived, tile.slice(0, BN // 2))
        tma.async_copy_global_to_shared(other_desc, [row, k * DEPTH], arrived, tile.slice(BN // 2, BN // 2))


@gluon.jit
def ask_for_weights(
    w_desc, other_desc, x_desc, row, first,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Begins a product: a ring, and the weight's first tiles on their way into it.

    Args:
        w_desc, other_desc: the weight, of whose rows from `row` on a tile is made; with two halves of one each.
        x_desc: the rows; of what they hold nothing is read yet.
        row: of both.
        first: tile of K.
    """
    DEPTH: gl.constexpr = w_desc.block_shape[1]
    ws = gl.allocate_shared_memory(w_desc.dtype, [ENTRIES, BN, DEPTH], w_desc.layout)
    xs = gl.allocate_shared_memory(x_desc.dtype, [ENTRIES, M, DEPTH], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ENTRIES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(ENTRIES):
        mbarrier.expect(full.index(i), BN * _SPAN + M * DEPTH * _BYTES)
        _copy_weight(w_desc, other_desc, ws, full, i, row, first + i, BN, HALVES)
    return ws, xs, full


@gluon.jit
def ask_for_rows(x_desc, xs, full, first, ENTRIES: gl.constexpr):
    """Goes on: the rows are there."""
    DEPTH: gl.constexpr = x_desc.block_shape[1]
    for i in gl.static_range(ENTRIES):
        tma.async_copy_global_to_shared(x_desc, [0, (first + i) * DEPTH], full.index(i), xs.index(i))


@gluon.jit
def _ask_for(
    w_desc, other_desc, x_desc, ws, xs, full, row, first, k, steps,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The tiles that take the place of number k, if there are any."""
    DEPTH: gl.constexpr = w_desc.block_shape[1]
    after, slot = k + ENTRIES, k % ENTRIES
    if after < steps:
        mbarrier.expect(full.index(slot), BN * _SPAN + M * DEPTH * _BYTES)
        _copy_weight(w_desc, other_desc, ws, full, slot, row, first + after, BN, HALVES)
        tma.async_copy_global_to_shared(x_desc, [0, (first + after) * DEPTH], full.index(slot), xs.index(slot))


@gluon.jit
def sum_up(
    w_desc, other_desc, x_desc, ws, xs, full, row, first, steps,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Ends it: float32 [BN, M], over `steps` tiles of K, `ENTRIES` at least."""
    DEPTH: gl.constexpr = w_desc.block_shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    acc = gl.zeros([BN, M], gl.float32, SUMS)
    if w_desc.dtype == x_desc.dtype:
        for k in range(steps):
            slot = k % ENTRIES
            mbarrier.wait(full.index(slot), k // ENTRIES % 2)
            acc = warpgroup_mma(ws.index(slot), xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # this one may run on; the one before is done
            barrier()  # in all warps
            if k > 0:
                _ask_for(w_desc, other_desc, x_desc, ws, xs, full, row, first, k - 1, steps, M, BN, ENTRIES, HALVES)
    else:
        for k in range(steps):
            slot = k % ENTRIES
            mbarrier.wait(full.index(slot), k // ENTRIES % 2)
            w = in_bfloat16(ws.index(slot), SUMS, BN, DEPTH)
            acc = warpgroup_mma(w, xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc, w = warpgroup_mma_wait(0, deps=(acc, w))
            barrier()  # in all warps
            _ask_for(w_desc, other_desc, x_desc, ws, xs, full, row, first, k, steps, M, BN, ENTRIES, HALVES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()  # other groups of warps, too: what follows may lie where the ring does
    return acc


@gluon.jit
def scaled(acc, scale_ptr, first, other, N: gl.constexpr, BN: gl.constexpr):
    """Sums times the scales of their rows, of N: one half of the tile's from `first` on, the other from `other`."""
    n = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout))
    rows = gl.where(n < BN // 2, first + n, other + n - BN // 2)
    return acc * gl.load(scale_ptr + gl.minimum(rows, N - 1))[:, None]


@gluon.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    w_desc, scale_ptr, x_desc, out_ptr, num_rows,
    N: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = (K + w_desc.block_shape[1] - 1) // w_desc.block_shape[1]
    tile, part = gl.program_id(0) // PARTS, gl.program_id(0) % PARTS
    first = STEPS * part // PARTS
    steps = STEPS * (part + 1) // PARTS - first
    ws, xs, full = ask_for_weights(w_desc, w_desc, x_desc, tile * BN, first, M, BN, ENTRIES, 1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ask_for_rows(x_desc, xs, full, first, ENTRIES)
    acc = sum_up(w_desc, w_desc, x_desc, ws, xs, full, tile * BN, first, steps, M, BN, ENTRIES, 1)
    if w_desc.dtype != x_desc.dtype:
        acc = scaled(acc, scale_ptr, tile * BN, tile * BN + BN // 2, N, BN)
    SUMS: gl.constexpr = acc.type.layout
    n, m = gl.arange(0, BN, gl.SliceLayout(1, SUMS)), gl.arange(0, M, gl.SliceLayout(0, SUMS))
    out = out_ptr + (part * num_rows + m)[None, :].to(gl.int64) * N + tile * BN + n[:, None]
    gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :] & (n >= 0)[:, None])


def rows_product(x_SK: torch.Tensor, w: Matrix, out: torch.Tensor, tile: RowsTile, *, pdl: bool = False) -> None:
    """out = x @ wᵀ, added in float32.

    Args:
        x_SK: bfloat16 or float16, contiguous.
        w: of the same type, or of 8 bits beside bfloat16, with a scale a row.
        out: [S, N], or, if the tile has several parts, [P, S, N], whose sum over P it is; contiguous.
        tile: from `choose_rows_tile`.
        pdl: programmatic dependent launch.
    """
    (N, K), S = w.shape, len(x_SK)
    M = padded(S)
    _product_kernel[(N // tile.rows * tile.parts,)](
        descriptor(w.q, tile.rows), w.q if w.scale is None else w.scale, descriptor(x_SK, M, w.q), out, S,
        N=N, K=K, PARTS=tile.parts, M=M, BN=tile.rows, ENTRIES=tile.entries, PDL=pdl, num_warps=warps(tile),
        launch_pdl=pdl,
    )  # fmt: skip
