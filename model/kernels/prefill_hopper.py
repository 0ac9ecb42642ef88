"""Chunks of prompts over the paged KV cache on Hopper: `prefill_attention.py`'s work, made by warp groups that wait for
copies and products instead of doing them (Shah et al., "FlashAttention-3", 2024).

A program has a processor to itself and draws *items*, 128 rows of one key/value head's queries, until there are none:
how long one takes depends on what it sees, so who is done draws the next. One warp, the producer, draws and asks for
keys and values, 16 neighbours a copy (a block of the cache is one or several of them), into a ring that goes on from
item to item. Two groups of four warps, the consumers, have 64 rows each. While the tensor cores make scores of one tile
of keys and add up the values of the tile before, a group finds the weights; and what one group leaves idle, the other
one uses.

Keys come last first: masks are needed at the beginning only.

Written in Gluon, Triton's language for kernels that say which lane holds what; needs Hopper's asynchronous copies and
products. Names are those of `prefill_attention.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tpserve.model.kernels.block_copies import barrier, descriptors
from tpserve.model.kernels.prefill_copies import DRAWN, ENTRIES, KEYS, ROWS, hear, item, produce, seen_by


@gluon.jit
def _ask(q_ptr, q_s, head, first, queries, tile, q_stride, W: gl.constexpr, G: gl.constexpr, E: gl.constexpr,
         WHOLE: gl.constexpr):  # fmt: skip
    """Asks for a group's queries."""
    m = tile * ROWS + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, WHOLE))
    e, query = gl.arange(0, E, gl.SliceLayout(0, WHOLE)), m // G
    q_at = q_ptr + (first + query).to(gl.int64) * q_stride + (head * G + m % G) * E
    mask = (query < queries)[:, None] & (e >= 0)[None, :]
    async_copy.async_copy_global_to_shared(q_s, q_at[:, None] + e[None, :], mask=mask)
    async_copy.commit_group()


@gluon.jit
def _weigh(score, best, total, scale, at, last_m, MASKED: gl.constexpr, SCORES: gl.constexpr):
    """(weights, what earlier sums fade by, best, total) of a tile's scores."""
    if MASKED:
        pos = at + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
        score = gl.where(pos[None, :] <= last_m[:, None], score, float("-inf"))
    new_best = gl.maximum(best, gl.max(score, 1) * scale)
    # A row may see nothing of the first tiles.
    above = gl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
    weight = gl.exp2(score * scale - above[:, None])
    fade = gl.exp2(best - above)
    return weight, fade, new_best, total * fade + gl.sum(weight, 1)


@gluon.jit
def _round(
    n, at, q, ks, vs, full, free, weight, acc, fade, best, total, scale, last_m,
    MASKED: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Scores of entry n's keys, which are all there, and the sum of its values with the weights of the round before."""
    slot, after = n % ENTRIES, (n + 1) % ENTRIES
    none = gl.zeros([64, KEYS], gl.float32, SCORES)
    score = warpgroup_mma(q, ks.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
    acc = warpgroup_mma(weight, vs.index(slot), acc, is_async=True)
    score = warpgroup_mma_wait(1, deps=(score,))
    new_weight, fade, best, total = _weigh(score, best, total, scale, at, last_m, MASKED, SCORES)
    weight = gl.convert_layout(new_weight.to(weight.dtype), weight.type.layout)
    # Here, for ptxas moves nothing past the loop of a wait: without it, weights are found when the values are summed.
    mbarrier.wait(full.index(after), (n + 1) // ENTRIES % 2)
    acc, weight = warpgroup_mma_wait(0, deps=(acc, weight))
    barrier()  # all four warps have read
    mbarrier.arrive(free.index(slot))
    return weight, acc, fade, best, total


@gluon.jit
def _consume(
    q_ptr, out_ptr, tiles_ptr, items, qs, ks, vs, full, free, tickets, drawn, q_stride, out_stride, scale,
    W: gl.constexpr, K: gl.constexpr, G: gl.constexpr, E: gl.constexpr,
):  # fmt: skip
    """Rows 64W … 64W + 63 of this program's items."""
    TYPE: gl.constexpr = q_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])
    all_items = gl.load(tiles_ptr + items * 5 + 1) * K
    n, j = gl.to_tensor(0), gl.to_tensor(0)
    ticket = hear(tickets, drawn, j)
    head, first, queries, tile, context, _row = item(tiles_ptr, ticket, all_items, K)
    _ask(q_ptr, qs.index(2 * W), head, first, queries, tile, q_stride, W, G, E, WHOLE)
    while ticket < all_items:
        q_s = qs.index(2 * W + j % 2)
        j += 1
        ticket = hear(tickets, drawn, j)
        next_head, next_first, next_queries, next_tile, next_context, _row = item(tiles_ptr, ticket, all_items, K)
        async_copy.wait_group(0)
        barrier()
        # Into registers: with both operands in it, shared memory is too slow.
        q = q_s.load(gl.DotOperandLayout(0, SCORES, 2))
        rounds = (seen_by(queries, tile, context, ROWS, G) + KEYS - 1) // KEYS
        own = (seen_by(queries, tile, context, W * 64 + 64, G) + KEYS - 1) // KEYS
        for _of_the_others in range(rounds - own):
            mbarrier.wait(full.index(n % ENTRIES), n // ENTRIES % 2)
            barrier()  # all four warps have seen it
            mbarrier.arrive(free.index(n % ENTRIES))
            n += 1
        m = tile * ROWS + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        last_m = context + gl.minimum(m // G, queries - 1)  # the last key that a row sees
        seen_by_all = gl.minimum((context + (tile * ROWS + W * 64) // G + 1) // KEYS, own - 1)
        best = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([64, E], gl.float32, SUMS)
        mbarrier.wait(full.index(n % ENTRIES), n // ENTRIES % 2)
        none = gl.zeros([64, KEYS], gl.float32, SCORES)
        score = warpgroup_mma(q, ks.index(n % ENTRIES).permute((1, 0)), none, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))
        barrier()
        mbarrier.arrive(free.index(n % ENTRIES))
        n += 1
        _ask(q_ptr, qs.index(2 * W + j % 2), next_head, next_first, next_queries, next_tile, q_stride, W, G, E, WHOLE)
        weight, fade, best, total = _weigh(score, best, total, scale, (own - 1) * KEYS, last_m, True, SCORES)
        weight = gl.convert_layout(weight.to(TYPE), gl.DotOperandLayout(0, SUMS, 2))
        mbarrier.wait(full.index(n % ENTRIES), n // ENTRIES % 2)
        for i in range(1, own - seen_by_all):
            weight, acc, fade, best, total = _round(
                n, (own - 1 - i) * KEYS, q, ks, vs, full, free, weight, acc, fade, best, total, scale, last_m,
                True, SCORES, SUMS,
            )  # fmt: skip
            n += 1
        for _i in range(own - seen_by_all, own):
            weight, acc, fade, best, total = _round(
                n, 0, q, ks, vs, full, free, weight, acc, fade, best, total, scale, last_m, False, SCORES, SUMS
            )
            n += 1
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None]
        acc = warpgroup_mma(weight, vs.index(n % ENTRIES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        barrier()
        mbarrier.arrive(free.index(n % ENTRIES))
        n += 1
        q_s.store((acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]).to(TYPE))
        barrier()
        m = tile * ROWS + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, WHOLE))
        e, query = gl.arange(0, E, gl.SliceLayout(0, WHOLE)), m // G
        out_at = out_ptr + (first + query).to(gl.int64) * out_stride + (head * G + m % G) * E
        gl.store(out_at[:, None] + e[None, :], q_s.load(WHOLE), mask=(query < queries)[:, None] & (e >= 0)[None, :])
        head, first, queries, tile, context = next_head, next_first, next_queries, next_tile, next_context
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["table_stride", "items"])
def _prefill_kernel(
    q_ptr, k_desc, v_desc, v_ptr, tables_ptr, tiles_ptr, out_ptr, q_stride, out_stride, table_stride, items, scale,
    K: gl.constexpr, G: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    TYPE: gl.constexpr = q_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ks = gl.allocate_shared_memory(TYPE, [ENTRIES, KEYS, E], TILE)
    vs = gl.allocate_shared_memory(TYPE, [ENTRIES, KEYS, E], TILE)
    qs = gl.allocate_shared_memory(TYPE, [4, 64, E], TILE)  # of two groups, this item's and the next one's
    full = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [ENTRIES, 1], BARRIER)
    drawn = gl.allocate_shared_memory(gl.int64, [DRAWN, 1], BARRIER)
    tickets = gl.allocate_shared_memory(gl.int32, [DRAWN, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(ENTRIES):
        mbarrier.init(full.index(i), count=2)  # keys, values
        mbarrier.init(free.index(i), count=2)  # both groups
    for i in gl.static_range(DRAWN):
        mbarrier.init(drawn.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (q_ptr, out_ptr, tiles_ptr, items, qs, ks, vs, full, free, tickets, drawn, q_stride, out_stride,
                        scale, 0, K, G, E)),
            (_consume, (q_ptr, out_ptr, tiles_ptr, items, qs, ks, vs, full, free, tickets, drawn, q_stride, out_stride,
                        scale, 1, K, G, E)),
            (produce, (k_desc, v_desc, v_ptr, tables_ptr, table_stride, tiles_ptr, items, ks, vs, full, free, tickets,
                        drawn, K, G, E, BLOCK)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(
    q_THE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_RB: torch.Tensor,
    tiles_I5: torch.Tensor,
    out_THE: torch.Tensor,
    block_size: int,
) -> None:
    """`paged_prefill_attention` with tiles of `ROWS` rows, for what `hopper_takes` says yes to."""
    E, K = q_THE.shape[2], k_cache.shape[1]
    k_desc, v_desc = descriptors(k_cache, v_cache)
    items = len(tiles_I5) - 1
    processors = torch.cuda.get_device_properties(q_THE.device).multi_processor_count
    _prefill_kernel[(min(items * K, processors),)](
        q_THE, k_desc, v_desc, v_cache, tables_RB, tiles_I5, out_THE,
        q_THE.stride(0), out_THE.stride(0), tables_RB.stride(0), items, math.log2(math.e) / math.sqrt(E),
        K=K, G=q_THE.shape[1] // K, E=E, BLOCK=block_size, num_warps=4,
    )  # fmt: skip
