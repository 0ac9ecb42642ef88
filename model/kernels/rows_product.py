"""Products of some tens of rows on Hopper: x @ wᵀ, where reading w once is most of the time.

The weight's rows are the left operand of the tensor cores and the step's the right one, so that no lane works for rows
that are not there. Tiles of both come by the copy engine into a ring; the weight's first ones are asked for before the
kernel in front has ended. A program has a tile of the output, or, so that all processors have as much to read, a part
of its sum: parts are left for the next kernel to add, which reads the output anyway. Weights of fewer bits are widened
on the way from the ring to the tensor cores (`rows_widened.py`).

Shape suffixes: S rows of the step, N output and K input features, P parts.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

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
from tpserve.model.kernels.rows_tile import SPAN_BYTES, RowsTile, padded, warps
from tpserve.model.kernels.rows_widened import GROUP, group_scales, in_bfloat16, nibbles_in_bfloat16, scaled
from tpserve.model.matrix import Matrix

_SPAN = gl.constexpr(SPAN_BYTES)
_BYTES = gl.constexpr(2)  # of a row's number


def weight_descriptor(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of so many rows of a weight, whose columns are contiguous, and as many columns as fill the span."""
    bits = 8 * matrix.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)
    return TensorDescriptor(
        matrix, list(matrix.shape), list(matrix.stride()), [rows, _SPAN.value // matrix.element_size()], layout
    )  # fmt: skip


def rows_descriptor(x_SK: torch.Tensor, rows: int, weight: torch.Tensor) -> TensorDescriptor:
    """For copies of so many of the step's rows, and as many columns as a tile of the weight has; beside int4, of a
    quarter of them, for they lie in another order there."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    depth = 64 if weight.dtype == torch.uint8 else _SPAN.value // weight.element_size()
    return TensorDescriptor(x_SK, list(x_SK.shape), list(x_SK.stride()), [rows, depth], layout)


@gluon.constexpr_function
def depth_of(w_desc):
    """Inputs of a tile of the weight."""
    columns = w_desc.block_shape[1]
    return 2 * columns if w_desc.dtype == gl.uint8 else columns


@gluon.constexpr_function
def steps_of(w_desc, K):
    """Tiles along K."""
    return -(-K // depth_of(w_desc))


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
def _copy_rows(x_desc, xs, full, slot, k):
    """Of a tile; beside int4, in the order of `nibbles_in_bfloat16`: both groups' first halves, then their second."""
    DEPTH: gl.constexpr = xs.shape[2]
    tile, arrived = xs.index(slot), full.index(slot)
    if x_desc.block_shape[1] == DEPTH:
        tma.async_copy_global_to_shared(x_desc, [0, k * DEPTH], arrived, tile)
    else:
        HALF: gl.constexpr = GROUP // 2
        for i in gl.static_range(4):
            at = k * DEPTH + i % 2 * GROUP + i // 2 * HALF
            tma.async_copy_global_to_shared(x_desc, [0, at], arrived, tile.slice(i * HALF, HALF, dim=1))


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
    DEPTH: gl.constexpr = depth_of(w_desc)
    ws = gl.allocate_shared_memory(w_desc.dtype, [ENTRIES, BN, w_desc.block_shape[1]], w_desc.layout)
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
    for i in gl.static_range(ENTRIES):
        _copy_rows(x_desc, xs, full, i, first + i)


@gluon.jit
def _ask_for(
    w_desc, other_desc, x_desc, ws, xs, full, row, first, k, steps,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """The tiles that take the place of number k, if there are any."""
    after, slot = k + ENTRIES, k % ENTRIES
    if after < steps:
        mbarrier.expect(full.index(slot), BN * _SPAN + M * xs.shape[2] * _BYTES)
        _copy_weight(w_desc, other_desc, ws, full, slot, row, first + after, BN, HALVES)
        _copy_rows(x_desc, xs, full, slot, first + after)


@gluon.jit
def sum_up(
    w_desc, other_desc, x_desc, ws, xs, full, scales, row, first, steps,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Ends it: float32 [BN, M], over `steps` tiles of K, `ENTRIES` at least; scales: of int4, from `group_scales`."""
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
            x = xs.index(slot)
            if w_desc.dtype == gl.uint8:
                low, high = nibbles_in_bfloat16(ws.index(slot), scales.index(k), SUMS, BN)
                acc = warpgroup_mma(low, x.slice(0, GROUP, dim=1).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma(high, x.slice(GROUP, GROUP, dim=1).permute((1, 0)), acc, is_async=True)
                acc, low, high = warpgroup_mma_wait(0, deps=(acc, low, high))
            else:
                w = in_bfloat16(ws.index(slot), SUMS, BN, w_desc.block_shape[1])
                acc = warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
                acc, w = warpgroup_mma_wait(0, deps=(acc, w))
            barrier()  # in all warps
            _ask_for(w_desc, other_desc, x_desc, ws, xs, full, row, first, k, steps, M, BN, ENTRIES, HALVES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()  # other groups of warps, too: what follows may lie where the ring does
    return acc


@gluon.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    w_desc, scale_ptr, x_desc, out_ptr, num_rows,
    N: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = steps_of(w_desc, K)
    tile, part = gl.program_id(0) // PARTS, gl.program_id(0) % PARTS
    first = STEPS * part // PARTS
    steps = STEPS * (part + 1) // PARTS - first
    row = tile * BN
    ws, xs, full = ask_for_weights(w_desc, w_desc, x_desc, row, first, M, BN, ENTRIES, 1)
    if PDL:
        gdc_launch_dependents()
    scales = full
    if w_desc.dtype == gl.uint8:
        scales = group_scales(scale_ptr, row, row + BN // 2, 2 * first, K, N, 1, BN, (STEPS + PARTS - 1) // PARTS)
    if PDL:
        gdc_wait()
    ask_for_rows(x_desc, xs, full, first, ENTRIES)
    acc = sum_up(w_desc, w_desc, x_desc, ws, xs, full, scales, row, first, steps, M, BN, ENTRIES, 1)
    if w_desc.dtype != x_desc.dtype and w_desc.dtype != gl.uint8:
        acc = scaled(acc, scale_ptr, row, row + BN // 2, N, 1, BN)
    SUMS: gl.constexpr = acc.type.layout
    n, m = gl.arange(0, BN, gl.SliceLayout(1, SUMS)), gl.arange(0, M, gl.SliceLayout(0, SUMS))
    out = out_ptr + (part * num_rows + m)[None, :].to(gl.int64) * N + tile * BN + n[:, None]
    gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :] & (n >= 0)[:, None])


def rows_product(x_SK: torch.Tensor, w: Matrix, out: torch.Tensor, tile: RowsTile, *, pdl: bool = False) -> None:
    """out = x @ wᵀ, added in float32.

    Args:
        x_SK: bfloat16 or float16, contiguous.
        w: of the same type, or beside bfloat16 of 8 bits with a scale a row, or of 4 with one for 128 inputs.
        out: [S, N], or, if the tile has several parts, [P, S, N], whose sum over P it is; contiguous.
        tile: from `choose_rows_tile`.
        pdl: programmatic dependent launch.
    """
    (N, K), S = w.shape, len(x_SK)
    M = padded(S)
    _product_kernel[(N // tile.rows * tile.parts,)](
        weight_descriptor(w.q, tile.rows), w.q if w.scale is None else w.scale, rows_descriptor(x_SK, M, w.q), out, S,
        N=N, K=K, PARTS=tile.parts, M=M, BN=tile.rows, ENTRIES=tile.entries, PDL=pdl, num_warps=warps(tile),
        launch_pdl=pdl,
    )  # fmt: skip
