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

MAX_ROWS = 64  # with more, cuBLAS is faster, but for
_FEWEST_OF_MANY, MOST_ROWS = 112, 128
_DEPTH = gl.constexpr(64)  # of a tile: as far as the copy engine swaps banks
_BYTES = gl.constexpr(2)
_ROOM = 225 << 10  # bytes of a processor's shared memory
_MAX_ENTRIES = 12
_FEWEST, _MOST = 0.7, 2.75  # programs, of the processors: fewer would not keep the memory busy


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
    S: int, N: int, K: int, processors: int, *, in_parts: bool = False, with_end: bool = False
) -> RowsTile | None:
    """As measured on an H200, with 7B's shapes; None: cuBLAS is the way.

    Args:
        S: of the step.
        N, K: of the weight.
        processors: of the device.
        in_parts: whether the sums may be left in parts.
        with_end: whether the product saves SiLU's pass over twice its outputs.
    """
    depth = _DEPTH.value
    # With many rows, large tiles, which read them less often, if all run at a time with a processor each.
    large = _MOST * processors < N // 64 or (
        S > 32 and not in_parts and _FEWEST * processors <= N // 128 <= processors
    )  # fmt: skip
    rows = 128 if large else 64
    if not _suits(S, in_parts or with_end) or N % rows or K % depth:
        return None
    tiles, steps = N // rows, K // depth
    parts = 1
    if in_parts:
        each = 2 if S <= 32 or processors // tiles * tiles < _FEWEST * processors else 1
        parts = max(1, min(each * processors // tiles, steps // 3))
    programs = tiles * parts
    room = _ROOM // -(-programs // processors) // ((rows + padded(S)) * depth * _BYTES.value)  # all run at a time
    entries = min(_MAX_ENTRIES, room, steps // parts)
    if entries < 3 or not _FEWEST * processors <= programs <= _MOST * processors:
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


def descriptor(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    """For copies of so many rows of a matrix of 16-bit numbers, whose columns are contiguous."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, _DEPTH.value], layout)


@gluon.jit
def _copy_weight(w_desc, other_desc, ws, full, slot, row, k, BN: gl.constexpr, HALVES: gl.constexpr):
    """Of a tile, BN rows, or as many halves of it."""
    tile, arrived = ws.index(slot), full.index(slot)
    if HALVES == 1:
        tma.async_copy_global_to_shared(w_desc, [row, k * _DEPTH], arrived, tile)
    else:
        tma.async_copy_global_to_shared(w_desc, [row, k * _DEPTH], arrived, tile.slice(0, BN // 2))
        tma.async_copy_global_to_shared(other_desc, [row, k * _DEPTH], arrived, tile.slice(BN // 2, BN // 2))


@gluon.jit
def ask_for_weights(
    w_desc, other_desc, row, first, M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr
):
    """Begins a product: a ring, and the weight's first tiles on their way into it.

    Args:
        w_desc, other_desc: the weight, of whose rows from `row` on a tile is made; with two halves of one each.
        row: of both.
        first: tile of K.
    """
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ws = gl.allocate_shared_memory(w_desc.dtype, [ENTRIES, BN, _DEPTH], TILE)
    xs = gl.allocate_shared_memory(w_desc.dtype, [ENTRIES, M, _DEPTH], TILE)
    full = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ENTRIES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(ENTRIES):
        mbarrier.expect(full.index(i), (BN + M) * _DEPTH * _BYTES)
        _copy_weight(w_desc, other_desc, ws, full, i, row, first + i, BN, HALVES)
    return ws, xs, full


@gluon.jit
def ask_for_rows(x_desc, xs, full, first, ENTRIES: gl.constexpr):
    """Goes on: the rows are there."""
    for i in gl.static_range(ENTRIES):
        tma.async_copy_global_to_shared(x_desc, [0, (first + i) * _DEPTH], full.index(i), xs.index(i))


@gluon.jit
def sum_up(
    w_desc, other_desc, x_desc, ws, xs, full, row, first, steps,
    M: gl.constexpr, BN: gl.constexpr, ENTRIES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Ends it: float32 [BN, M], over `steps` tiles of K, `ENTRIES` at least."""
    acc = gl.zeros([BN, M], gl.float32, gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16]))
    for k in range(steps):
        slot = k % ENTRIES
        mbarrier.wait(full.index(slot), k // ENTRIES % 2)
        acc = warpgroup_mma(ws.index(slot), xs.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # this one may run on; the one before is done
        barrier()  # in all warps
        after = k - 1 + ENTRIES
        if (k > 0) & (after < steps):
            mbarrier.expect(full.index(after % ENTRIES), (BN + M) * _DEPTH * _BYTES)
            _copy_weight(w_desc, other_desc, ws, full, after % ENTRIES, row, first + after, BN, HALVES)
            where = [0, (first + after) * _DEPTH]
            tma.async_copy_global_to_shared(x_desc, where, full.index(after % ENTRIES), xs.index(after % ENTRIES))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()  # other groups of warps, too: what follows may lie where the ring does
    return acc


@gluon.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    w_desc, x_desc, out_ptr, num_rows, N: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr,
    BN: gl.constexpr, ENTRIES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = K // _DEPTH
    tile, part = gl.program_id(0) // PARTS, gl.program_id(0) % PARTS
    first = STEPS * part // PARTS
    steps = STEPS * (part + 1) // PARTS - first
    ws, xs, full = ask_for_weights(w_desc, w_desc, tile * BN, first, M, BN, ENTRIES, 1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ask_for_rows(x_desc, xs, full, first, ENTRIES)
    acc = sum_up(w_desc, w_desc, x_desc, ws, xs, full, tile * BN, first, steps, M, BN, ENTRIES, 1)
    SUMS: gl.constexpr = acc.type.layout
    n, m = gl.arange(0, BN, gl.SliceLayout(1, SUMS)), gl.arange(0, M, gl.SliceLayout(0, SUMS))
    out = out_ptr + (part * num_rows + m)[None, :].to(gl.int64) * N + tile * BN + n[:, None]
    gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :] & (n >= 0)[:, None])


def rows_product(
    x_SK: torch.Tensor, w_NK: torch.Tensor, out: torch.Tensor, tile: RowsTile, *, pdl: bool = False
) -> None:
    """out = x @ wᵀ, added in float32.

    Args:
        x_SK: bfloat16 or float16, contiguous.
        w_NK: of the same type, contiguous.
        out: [S, N], or, if the tile has several parts, [P, S, N], whose sum over P it is; contiguous.
        tile: from `choose_rows_tile`.
        pdl: programmatic dependent launch.
    """
    (N, K), S = w_NK.shape, len(x_SK)
    M = padded(S)
    _product_kernel[(N // tile.rows * tile.parts,)](
        descriptor(w_NK, tile.rows), descriptor(x_SK, M), out, S, N=N, K=K, PARTS=tile.parts, M=M, BN=tile.rows,
        ENTRIES=tile.entries, PDL=pdl, num_warps=warps(tile), launch_pdl=pdl,
    )  # fmt: skip
