# Kernels are compiled by Triton from their source; a checker sees no types in them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Decoding over the paged KV cache: one query token a sequence, the keys split among programs.

Split keys: Dao et al., "Flash-Decoding for long-context inference", 2023.

Shape suffixes: S sequences (a bucket: entries of length 0 are padding), H query heads and K key/value heads of this
rank, G = H / K, E head width, R rows and B blocks of the block tables.

What a program takes was dealt before (`decode_plan.py`): an item, a stretch of one sequence's keys. The last program of
a sequence to finish adds up what all of them found.

Where Hopper's copy engine can bring keys and values, `decode_hopper.py` does the same.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels.attend import attend, beside_float8
from tpserve.model.kernels.decode_plan import ITEM, Cut, DecodeScratch


@triton.jit
def _add_up(
    partial_ptr, lse_ptr, first, splits, e,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, CS: tl.constexpr, CG: tl.constexpr,
):  # fmt: skip
    """The attention of G heads from their items' partial ones, float32 [CG, EP]."""
    c, h = tl.arange(0, CS), tl.arange(0, CG)
    best = tl.full([CG], float("-inf"), tl.float32)
    total = tl.zeros([CG], tl.float32)
    acc = tl.zeros([CG, EP], tl.float32)
    for part in tl.range(0, splits, CS):  # several at once: one after the other, each would wait for the L2 cache
        live = ((part + c)[:, None] < splits) & (h[None, :] < G)
        at = first + (part + c)[:, None] * H + h[None, :]
        mask = live[:, :, None] & (e[None, None, :] < E)
        lse = tl.load(lse_ptr + at, mask=live, other=float("-inf"), cache_modifier=".cg")
        value = tl.load(partial_ptr + at[:, :, None] * E + e[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_best = tl.where(h < G, tl.maximum(best, tl.max(lse, 0)), 0.0)
        weight = tl.exp2(lse - new_best[None, :])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade[:, None] + tl.sum(value * weight[:, :, None], 0)
        best = new_best
    return acc / total[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, out_ptr, items_ptr, partial_ptr, lse_ptr, arrived_ptr,
    q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, CS: tl.constexpr, CG: tl.constexpr, ITEM: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0) // K, tl.program_id(0) % K
    item_ptr = items_ptr + item * ITEM
    # .cg: written in this step, and read before the kernel in front has ended.
    seq, row = tl.load(item_ptr, cache_modifier=".cg"), tl.load(item_ptr + 1, cache_modifier=".cg").to(tl.int64)
    start, end = tl.load(item_ptr + 2, cache_modifier=".cg"), tl.load(item_ptr + 3, cache_modifier=".cg")
    splits, first = tl.load(item_ptr + 5, cache_modifier=".cg"), tl.load(item_ptr + 6, cache_modifier=".cg")
    if seq < 0:
        return
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    H: tl.constexpr = K * G
    g, e, n = tl.arange(0, GP), tl.arange(0, EP), tl.arange(0, BN)
    eg_mask = (e[:, None] < E) & (g[None, :] < G)
    own = (head * G + g)[None, :] * E + e[:, None]
    q = tl.load(q_ptr + seq.to(tl.int64) * q_stride + own, mask=eg_mask, other=0.0)
    q = beside_float8(q, k_ptr.dtype.element_ty)
    PAIRED: tl.constexpr = k_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.float16
    best = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([EP // 2 if PAIRED else EP, GP], tl.float32)
    odd = acc  # with pairs of values, `acc` has the even ones and `odd` the others; else `acc` has all
    table_ptr = tables_ptr + row * table_stride
    # Each round reads the next one's block numbers: they are in registers when its keys' addresses are wanted.
    block = tl.load(table_ptr + (start + n) // BLOCK, mask=start + n < end, other=0)
    whole = start + tl.maximum(end - start, 0) // BN * BN
    for at in tl.range(start, whole, BN, num_stages=STAGES):
        block, best, total, acc, odd = attend(
            q, k_ptr, v_ptr, table_ptr, block, at, end, head, scale, best, total, acc, odd,
            K, E, EP, BLOCK, BN, OFFSET, PRECISION, PAIRED, True,
        )  # fmt: skip
    if whole < end:
        block, best, total, acc, odd = attend(
            q, k_ptr, v_ptr, table_ptr, block, whole, end, head, scale, best, total, acc, odd,
            K, E, EP, BLOCK, BN, OFFSET, PRECISION, PAIRED, False,
        )  # fmt: skip
    if PAIRED:
        acc = tl.reshape(tl.permute(tl.join(acc, odd), [0, 2, 1]), [EP, GP])
    if splits == 1:
        result = acc / tl.where(total == 0, 1.0, total)[None, :]  # padding: 0 / 1
        tl.store(out_ptr + seq.to(tl.int64) * out_stride + own, result.to(out_ptr.dtype.element_ty), mask=eg_mask)
        return
    # Neighbouring programs are the heads of one item: [items, H, E] lets them write side by side.
    at_item = item.to(tl.int64) * H
    tl.store(partial_ptr + at_item * E + own, acc / total[None, :], mask=eg_mask)
    tl.store(lse_ptr + at_item + head * G + g, best + tl.log2(total), mask=g < G)
    tl.debug_barrier()  # all threads' stores come before the one thread's release
    if tl.atomic_add(arrived_ptr + seq * K + head, 1, sem="acq_rel", scope="gpu") != splits - 1:
        return
    tl.store(arrived_ptr + seq * K + head, 0)
    result = _add_up(partial_ptr, lse_ptr, first.to(tl.int64) * H + head * G, splits, e, H, G, E, EP, CS, CG)
    h = tl.arange(0, CG)
    out = out_ptr + seq.to(tl.int64) * out_stride + (head * G + h)[:, None] * E + e[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=(h[:, None] < G) & (e[None, :] < E))


def paged_decode_attention(
    q_SHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_RB: torch.Tensor,
    out_SHE: torch.Tensor,
    cut: Cut,
    scratch: DecodeScratch,
    *,
    block_size: int,
    pdl: bool = False,
) -> None:
    """Attends one token of each sequence to all its keys; nothing here waits for the device.

    Args:
        q_SHE: bfloat16, float16 or float32; a slice of a wider projection may stand here (heads must be contiguous).
        k_cache, v_cache: [slots, K, E], the token's own key and value included.
        tables_RB: int32 or int64.
        out_SHE: written; zeros where a sequence is padding.
        cut, scratch: as they went through `decode_plan.deal` for this step.
        pdl: programmatic dependent launch: starts while kernels before still run, none of which may write items, block
            tables, or keys and values but each sequence's newest.
    """
    _, H, E = q_SHE.shape
    K, config = k_cache.shape[1], cut.config
    if config.hopper:
        from tpserve.model.kernels import decode_hopper  # Gluon is not in every Triton

        decode_hopper.launch(q_SHE, k_cache, v_cache, tables_RB, out_SHE, cut, scratch, block_size=block_size, pdl=pdl)
        return
    G = H // K
    CG = triton.next_power_of_2(G)
    _decode_kernel[(cut.items * K,)](
        q_SHE, k_cache, v_cache, tables_RB, out_SHE, scratch.items_I8, scratch.partial, scratch.lse, scratch.arrived,
        q_SHE.stride(0), out_SHE.stride(0), tables_RB.stride(0), math.log2(math.e) / math.sqrt(E),
        K=K, G=G, GP=max(8, CG), E=E, EP=max(16, triton.next_power_of_2(E)), BLOCK=block_size,
        BN=config.keys, STAGES=config.stages, CS=max(1, 16 * config.warps // CG), CG=CG, ITEM=ITEM,
        OFFSET=tl.int32 if k_cache.numel() < 2**31 else tl.int64,
        PRECISION="ieee" if q_SHE.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=config.warps, launch_pdl=pdl,
    )  # fmt: skip
