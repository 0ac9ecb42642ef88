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

MAX_ROWS = 64  # with 128, cuBLAS was faster
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


def choose_rows_tile(S: int, N: int, K: int, processors: int, *, in_parts: bool) -> RowsTile | None:
    """As measured on an H200, with 7B's shapes; None: cuBLAS is the way.

    Args:
        S: of the step.
        N, K: of the weight.
        processors: of the device.
        in_parts: whether the sums may be left in parts.
    """
    depth = _DEPTH.value
    rows = 64 if _MOST * processors >= N // 64 else 128
    if S > MAX_ROWS or N % rows or K % depth:
        return None
    tiles, steps = N // rows, K // depth
    parts = max(1, min((2 if S <= 32 else 1) * processors // tiles, steps // 3)) if in_parts else 1
    programs = tiles * parts
    room = _ROOM // (1 if programs <= processors else 2) // ((rows + _padded(S)) * depth * _BYTES.value)
    entries = min(_MAX_ENTRIES, room, steps // parts)
    if entries < 3 or not _FEWEST * processors <= programs <= _MOST * processors:
        return None
    return RowsTile(rows, parts, entries)


def most_in_parts(S: int, processors: int) -> int:
    """Numbers that a product of up to S rows leaves in parts, at most."""
    return 2 * processors * 64 * S


def _padded(S: int) -> int:
    return max(16, 1 << (S - 1).bit_length())


@gluon.jit
def _copy(desc, row, k, ring, slot, full):
    tma.async_copy_global_to_shared(desc, [row, k * _DEPTH], full.index(slot), ring.index(slot))


@gluon.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    w_desc, x_desc, out_ptr, num_rows, N: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr,
    BN: gl.constexpr, ENTRIES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    STEPS: gl.constexpr = K // _DEPTH
    BOTH: gl.constexpr = (BN + M) * _DEPTH * _BYTES
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    tile, part = gl.program_id(0) // PARTS, gl.program_id(0) % PARTS
    first = STEPS * part // PARTS
    steps = STEPS * (part + 1) // PARTS - first  # ENTRIES at least
    ws = gl.allocate_shared_memory(w_desc.dtype, [ENTRIES, BN, _DEPTH], TILE)
    xs = gl.allocate_shared_memory(x_desc.dtype, [ENTRIES, M, _DEPTH], TILE)
    full = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(ENTRIES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(ENTRIES):
        mbarrier.expect(full.index(i), BOTH)
        _copy(w_desc, tile * BN, first + i, ws, i, full)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(ENTRIES):
        _copy(x_desc, 0, first + i, xs, i, full)
    acc = gl.zeros([BN, M], gl.float32, SUMS)
    for k in range(steps):
        slot = k % ENTRIES
        mbarrier.wait(full.index(slot), k // ENTRIES % 2)
        acc = warpgroup_mma(ws.index(slot), xs.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # this one may run on; the one before is done
        barrier()  # in all warps
        after = k - 1 + ENTRIES
        if (k > 0) & (after < steps):
            mbarrier.expect(full.index(after % ENTRIES), BOTH)
            _copy(w_desc, tile * BN, first + after, ws, after % ENTRIES, full)
            _copy(x_desc, 0, first + after, xs, after % ENTRIES, full)
    acc = warpgroup_mma_wait(0, deps=(acc,))
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
    M = _padded(S)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_desc, x_desc = (
        TensorDescriptor(t, list(t.shape), [K, 1], [rows, _DEPTH.value], layout)
        for t, rows in ((w_NK, tile.rows), (x_SK, M))
    )
    _product_kernel[(N // tile.rows * tile.parts,)](
        w_desc, x_desc, out, S, N=N, K=K, PARTS=tile.parts, M=M, BN=tile.rows, ENTRIES=tile.entries, PDL=pdl,
        num_warps=max(4, tile.rows // 32), launch_pdl=pdl,
    )  # fmt: skip
