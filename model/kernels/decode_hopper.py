"""Decoding over the paged KV cache on Hopper: `paged_attention.py`'s work, with keys and values brought by the copy
engine.

A program is one warp. It asks for a whole tile by a few instructions of one lane, as many tiles ahead as its ring has
entries. All but the tile with the newest key are asked for before the kernel in front has ended: what is older, no
kernel of such a step writes (no row of it reads a block that another row writes).

Written in Gluon, Triton's language for kernels that say which lane holds what. Keys and values are the left operands of
the tensor cores, as in `attend.py`. Names are those of `paged_attention.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.block_copies import barrier, copy_tile, descriptors, places
from tpserve.model.kernels.decode_plan import ITEM, Cut, DecodeScratch

_BYTES = gl.constexpr(2)
# Which lane holds what: scores [keys, queries] and sums [E, queries], queries as they are loaded, [E, queries].
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8]))
_LOADED = gl.constexpr(gl.BlockedLayout([8, 1], [16, 2], [1, 1], [0, 1]))


@gluon.jit
def _copy(k_desc, v_desc, starts, column, ks, vs, slot, full, ENTRIES: gl.constexpr, BN: gl.constexpr, E: gl.constexpr):
    """Asks for a tile of keys and values."""
    mbarrier.expect(full.index(slot), 2 * BN * E * _BYTES)
    copy_tile(k_desc, starts, column, ks, slot, full.index(slot), ENTRIES, BN, E)
    copy_tile(v_desc, starts, column, vs, slot, full.index(slot), ENTRIES, BN, E)


@gluon.jit
def _attend(q, ks, vs, full, t, left, scale, best, total, acc, ENTRIES: gl.constexpr, BN: gl.constexpr,
            GP: gl.constexpr, WHOLE: gl.constexpr):  # fmt: skip
    """`attend.attend` of tile t, of which `left` keys are there; WHOLE: all of them."""
    V: gl.constexpr = gl.DotOperandLayout(0, _SCORES, 2)
    slot = t % ENTRIES
    mbarrier.wait(full.index(slot), t // ENTRIES % 2)
    k = ks.index(slot).load(gl.DotOperandLayout(0, _SCORES, 2))
    score = mma_v2(k, q, gl.zeros([BN, GP], gl.float32, _SCORES))
    if not WHOLE:
        score = gl.where((gl.arange(0, BN, gl.SliceLayout(1, _SCORES)) < left)[:, None], score, float("-inf"))
    new_best = gl.maximum(best, gl.max(score, 0) * scale)
    weight = gl.exp2(score * scale - new_best[None, :])
    fade = gl.exp2(best - new_best)
    total = total * fade + gl.sum(weight, 0)
    weight = gl.convert_layout(weight.to(q.dtype), gl.DotOperandLayout(1, _SCORES, 2))
    v = vs.index(slot).permute((1, 0)).load(V)
    if not WHOLE:  # what is behind a sequence's end may be anything, and 0 · NaN is NaN
        v = gl.where((gl.arange(0, BN, gl.SliceLayout(0, V)) < left)[None, :], v, gl.zeros_like(v))
    acc = mma_v2(v, weight, acc * fade[None, :])
    return new_best, total, acc


@gluon.jit
def _add_up(
    partial_ptr, lse_ptr, first, splits, H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, CS: gl.constexpr,
    CG: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """`paged_attention._add_up`, in PARTS [CS, CG, E] without its first dimension."""
    OUT: gl.constexpr = gl.SliceLayout(0, PARTS)
    LSE: gl.constexpr = gl.SliceLayout(2, PARTS)
    c, h = gl.arange(0, CS, gl.SliceLayout(1, LSE)), gl.arange(0, CG, gl.SliceLayout(0, LSE))
    e = gl.expand_dims(gl.arange(0, E, gl.SliceLayout(0, OUT))[None, :], 0)
    best = gl.full([CG], float("-inf"), gl.float32, gl.SliceLayout(0, LSE))
    total = gl.zeros([CG], gl.float32, gl.SliceLayout(0, LSE))
    acc = gl.zeros([CG, E], gl.float32, OUT)
    for part in range(0, splits, CS):
        live = ((part + c)[:, None] < splits) & (h[None, :] < G)
        at = first + (part + c)[:, None] * H + h[None, :]
        lse = gl.load(lse_ptr + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        value_at = partial_ptr + gl.expand_dims(at, 2) * E + e
        value = gl.load(value_at, mask=gl.expand_dims(live, 2), other=0.0, cache_modifier=".cg")
        new_best = gl.where(h < G, gl.maximum(best, gl.max(lse, 0)), 0.0)
        weight = gl.exp2(lse - new_best[None, :])
        fade = gl.exp2(best - new_best)
        total = total * fade + gl.sum(weight, 0)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
        acc += gl.sum(value * gl.expand_dims(weight, 2), 0)
        best = new_best
    return acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]


@gluon.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, k_desc, v_desc, tables_ptr, out_ptr, items_ptr, partial_ptr, lse_ptr, arrived_ptr,
    q_stride, out_stride, table_stride, scale,
    K: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, BN: gl.constexpr,
    ENTRIES: gl.constexpr, CS: gl.constexpr, CG: gl.constexpr, ITEM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    H: gl.constexpr = K * G
    item, head = gl.program_id(0) // K, gl.program_id(0) % K
    item_ptr = items_ptr + item * ITEM
    # .cg: written in this step, and read before the kernel in front has ended.
    seq, row = gl.load(item_ptr, cache_modifier=".cg"), gl.load(item_ptr + 1, cache_modifier=".cg").to(gl.int64)
    start, end = gl.load(item_ptr + 2, cache_modifier=".cg"), gl.load(item_ptr + 3, cache_modifier=".cg")
    length, splits = gl.load(item_ptr + 4, cache_modifier=".cg"), gl.load(item_ptr + 5, cache_modifier=".cg")
    first = gl.load(item_ptr + 6, cache_modifier=".cg")
    if seq < 0:
        return
    whole, tiles = (end - start) // BN, gl.cdiv(end - start, BN)
    table_ptr = tables_ptr + row * table_stride
    column = head * E
    ks = gl.allocate_shared_memory(TYPE, [ENTRIES, BN, E], TILE)
    vs = gl.allocate_shared_memory(TYPE, [ENTRIES, BN, E], TILE)
    full = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], mbarrier.MBarrierLayout())
    for t in gl.static_range(ENTRIES):
        mbarrier.init(full.index(t), count=1)
    fence_async_shared()
    barrier()
    early = tiles - (end == length).to(gl.int32)
    for t in gl.static_range(ENTRIES):
        if t < early:
            starts = places(table_ptr, start + t * BN, end, True, BLOCK, BN)
            _copy(k_desc, v_desc, starts, column, ks, vs, t, full, ENTRIES, BN, E)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if (early >= 0) & (early < tiles) & (early < ENTRIES):
        starts = places(table_ptr, start + early * BN, end, True, BLOCK, BN)
        _copy(k_desc, v_desc, starts, column, ks, vs, early, full, ENTRIES, BN, E)
    e, g = gl.arange(0, E, gl.SliceLayout(1, _LOADED)), gl.arange(0, GP, gl.SliceLayout(0, _LOADED))
    q_at = q_ptr + seq.to(gl.int64) * q_stride + (head * G + g)[None, :] * E + e[:, None]
    q = gl.load(q_at, mask=(g < G)[None, :] & (e >= 0)[:, None], other=0.0)
    q = gl.convert_layout(q, gl.DotOperandLayout(1, _SCORES, 2))
    best = gl.full([GP], float("-inf"), gl.float32, gl.SliceLayout(0, _SCORES))
    total = gl.zeros([GP], gl.float32, gl.SliceLayout(0, _SCORES))
    acc = gl.zeros([E, GP], gl.float32, _SCORES)
    for t in range(whole):
        # Before the tile is waited for: block numbers are there when its place in the ring is free.
        starts = places(table_ptr, start + (t + ENTRIES) * BN, end, True, BLOCK, BN)
        best, total, acc = _attend(q, ks, vs, full, t, BN, scale, best, total, acc, ENTRIES, BN, GP, True)
        barrier()  # all lanes have read
        if t + ENTRIES < tiles:
            _copy(k_desc, v_desc, starts, column, ks, vs, t % ENTRIES, full, ENTRIES, BN, E)
    if whole < tiles:
        left = end - start - whole * BN
        best, total, acc = _attend(q, ks, vs, full, whole, left, scale, best, total, acc, ENTRIES, BN, GP, False)
    e, g = gl.arange(0, E, gl.SliceLayout(1, _SCORES)), gl.arange(0, GP, gl.SliceLayout(0, _SCORES))
    own = (head * G + g)[None, :] * E + e[:, None]
    mask = (g < G)[None, :] & (e >= 0)[:, None]
    if splits == 1:
        result = acc / gl.where(total == 0, 1.0, total)[None, :]  # padding: 0 / 1
        gl.store(out_ptr + seq.to(gl.int64) * out_stride + own, result.to(TYPE), mask=mask)
        return
    # Neighbouring programs are the heads of one item: [items, H, E] lets them write side by side.
    at_item = item.to(gl.int64) * H
    gl.store(partial_ptr + at_item * E + own, acc / total[None, :], mask=mask)
    gl.store(lse_ptr + at_item + head * G + g, best + gl.log2(total), mask=g < G)
    barrier()  # all lanes' stores come before the one lane's release
    if gl.atomic_add(arrived_ptr + seq * K + head, 1, sem="acq_rel", scope="gpu") != splits - 1:
        return
    gl.store(arrived_ptr + seq * K + head, 0)
    PARTS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 128 // E, E // 4], [1, 1, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, PARTS)
    result = _add_up(partial_ptr, lse_ptr, first.to(gl.int64) * H + head * G, splits, H, G, E, CS, CG, PARTS)
    h, e = gl.arange(0, CG, gl.SliceLayout(1, OUT)), gl.arange(0, E, gl.SliceLayout(0, OUT))
    out = out_ptr + seq.to(gl.int64) * out_stride + (head * G + h)[:, None] * E + e[None, :]
    gl.store(out, result.to(TYPE), mask=(h < G)[:, None] & (e >= 0)[None, :])


def launch(
    q_SHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_RB: torch.Tensor,
    out_SHE: torch.Tensor,
    cut: Cut,
    scratch: DecodeScratch,
    *,
    block_size: int,
    pdl: bool,
) -> None:
    """`paged_decode_attention` for what `hopper_takes` says yes to."""
    _, H, E = q_SHE.shape
    K, config = k_cache.shape[1], cut.config
    G = H // K
    CG = triton.next_power_of_2(G)
    _decode_kernel[(cut.items * K,)](
        q_SHE, *descriptors(k_cache, v_cache), tables_RB, out_SHE,
        scratch.items_I8, scratch.partial, scratch.lse, scratch.arrived,
        q_SHE.stride(0), out_SHE.stride(0), tables_RB.stride(0), math.log2(math.e) / math.sqrt(E),
        K=K, G=G, GP=max(8, CG), E=E, BLOCK=block_size, BN=config.keys, ENTRIES=config.stages, CS=max(1, 16 // CG),
        CG=CG, ITEM=ITEM, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
