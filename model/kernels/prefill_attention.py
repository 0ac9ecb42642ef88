# Kernels are compiled by Triton from their source; a checker sees no types in them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Chunks of prompts over the paged KV cache (Dao, "FlashAttention-2", 2023), and the kernel that fills the cache.

Shape suffixes: P sequences laid end to end in T tokens, H query heads and K key/value heads of this rank, G = H / K,
E head width, C = E / 2, R rows and B blocks of the block tables.

The G query heads of a key/value head share its keys, so a tile's rows are (query, head) pairs: a short chunk fills a
tile with its heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, rows_ptr, starts_ptr, contexts_ptr, out_ptr,
    q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A head's last tile reads most keys: it goes first, so that the short ones fill the end.
    tile, head, p = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts_ptr + p).to(tl.int64)
    queries = (tl.load(starts_ptr + p + 1) - first).to(tl.int32)
    if tile * BM >= queries * G:
        return
    context = tl.load(contexts_ptr + p).to(tl.int32)
    table_ptr = tables_ptr + tl.load(rows_ptr + p).to(tl.int64) * table_stride
    m, e = tile * BM + tl.arange(0, BM), tl.arange(0, EP)
    query = m // G
    in_head = (head * G + m % G) * E
    mask = (query < queries)[:, None] & (e[None, :] < E)
    q = tl.load(q_ptr + ((first + query) * q_stride + in_head)[:, None] + e[None, :], mask=mask, other=0.0)
    last_m = context + tl.minimum(query, queries - 1)  # the last key that a row sees
    end = context + tl.minimum((tile * BM + BM - 1) // G + 1, queries)
    seen_by_all = context + tile * BM // G + 1
    acc = tl.zeros([BM, EP], tl.float32)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    n = tl.arange(0, BN)
    # Each round reads the next one's block numbers: they are in registers when its keys' addresses are wanted.
    block = tl.load(table_ptr + n // BLOCK, mask=n < end, other=0)
    for at in tl.range(0, end, BN, num_stages=STAGES):
        pos = at + n
        offset = (block.to(OFFSET) * BLOCK + pos % BLOCK) * (K * E) + head * E
        block = tl.load(table_ptr + (pos + BN) // BLOCK, mask=pos + BN < end, other=0)
        at_cache = offset[:, None] + e[None, :]
        there = (pos < end)[:, None] if EP == E else (pos < end)[:, None] & (e[None, :] < E)
        k = tl.load(k_ptr + at_cache, mask=there, other=0.0)
        v = tl.load(v_ptr + at_cache, mask=there, other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        if at + BN > seen_by_all:  # one loop: a second one for the masked tiles would fill its pipeline anew
            score = tl.where(pos[None, :] <= last_m[:, None], score, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, 1) * scale)
        weight = tl.exp2(score * scale - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        best = new_best
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + ((first + query) * out_stride + in_head)[:, None] + e[None, :], out, mask=mask)


def paged_prefill_attention(
    q_THE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_RB: torch.Tensor,
    rows_P: torch.Tensor,
    query_start_P1: torch.Tensor,
    context_len_P: torch.Tensor,
    max_query_len: int,
    out_THE: torch.Tensor,
    *,
    block_size: int,
    config: tuple[int, int, int, int] | None = None,
) -> None:
    """Attends query i of sequence p to its keys 0 ... context_len_P[p] + i; nothing here waits for the device.

    Args:
        q_THE: bfloat16, float16 or float32; heads must be contiguous, tokens may be further apart.
        k_cache, v_cache: [slots, K, E], the chunk's own keys and values included.
        tables_RB, rows_P: int32 or int64 block tables, and the row of each sequence.
        query_start_P1: where each sequence's queries begin in T, and where the last one's end; int32 or int64. Equal
            neighbours: a sequence without queries.
        context_len_P: keys in the cache before each chunk, int32 or int64.
        max_query_len: at least the longest chunk; the grid is cut to it.
        out_THE: written at the P sequences' tokens.
        config: (rows a tile, keys a tile, warps, pipeline stages) in place of the tuned ones.
    """
    E, K = q_THE.shape[2], k_cache.shape[1]
    G = q_THE.shape[1] // K
    EP = max(16, triton.next_power_of_2(E))
    if config is None and q_THE.dtype == torch.float32:
        config = (32, 32, 4, 1)
    # Taller tiles read the keys less often, but two of these fit a multiprocessor and fill each other's waits.
    BM, BN, warps, stages = config or (64, 64 if EP <= 128 else 32, 4, 3)
    _prefill_kernel[(triton.cdiv(max_query_len * G, BM), K, rows_P.shape[0])](
        q_THE, k_cache, v_cache, tables_RB, rows_P, query_start_P1, context_len_P, out_THE,
        q_THE.stride(0), out_THE.stride(0), tables_RB.stride(0), math.log2(math.e) / math.sqrt(E),
        K=K, G=G, E=E, EP=EP, BLOCK=block_size, BM=BM, BN=BN, STAGES=stages,
        OFFSET=tl.int32 if k_cache.numel() < 2**31 else tl.int64,
        PRECISION="ieee" if q_THE.dtype == torch.float32 else "tf32", num_warps=warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_stride"])
def _rope_and_write_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, rows_ptr, tables_ptr, rope_ptr, k_cache_ptr, v_cache_ptr,
    q_stride, k_stride, v_stride, table_stride,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    position = tl.load(positions_ptr + t)
    row = tl.load(rows_ptr + t).to(tl.int64)
    if position < 0:
        return
    block = tl.load(tables_ptr + row * table_stride + position // BLOCK).to(tl.int64)
    slot = (block * BLOCK + position % BLOCK) * (K * 2 * C)
    c, two = tl.arange(0, CP), tl.arange(0, 2)
    is_q, is_k = head < H, (head >= H) & (head < H + K)
    is_v = (head >= H + K) & (head < H + 2 * K)
    in_head = (2 * c[:, None] + two[None, :])[None, :, :]
    whole = (c < C)[None, :, None] & (two >= 0)[None, None, :]
    q_at = q_ptr + t * q_stride + head[:, None, None] * (2 * C) + in_head
    k_head, v_head = (head - H)[:, None, None] * (2 * C), (head - H - K)[:, None, None] * (2 * C)
    q_mask, k_mask, v_mask = is_q[:, None, None] & whole, is_k[:, None, None] & whole, is_v[:, None, None] & whole
    q = tl.load(q_at, mask=q_mask, other=0.0)
    k = tl.load(k_ptr + t * k_stride + k_head + in_head, mask=k_mask, other=0.0)
    v = tl.load(v_ptr + t * v_stride + v_head + in_head, mask=v_mask, other=0.0)
    rope_at = rope_ptr + position.to(tl.int64) * (2 * C) + 2 * c[:, None] + two[None, :]
    cos, sin = tl.split(tl.load(rope_at, mask=(c < C)[:, None] & (two >= 0)[None, :], other=0.0))
    even, odd = tl.split(tl.where(is_q[:, None, None], q, k).to(tl.float32))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos).to(q_ptr.dtype.element_ty)
    tl.store(q_at, turned, mask=q_mask)
    tl.store(k_cache_ptr + slot + k_head + in_head, turned, mask=k_mask)
    tl.store(v_cache_ptr + slot + v_head + in_head, v, mask=v_mask)


def rope_and_write(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    positions_T: torch.Tensor,
    rows_T: torch.Tensor,
    tables_RB: torch.Tensor,
    rope_PC2: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_size: int,
) -> None:
    """Rotates queries in place and writes rotated keys, and values, into the cache: `apply_rope` and two scatters.

    Args:
        q_THE, k_TKE, v_TKE: slices of one projection may stand here (heads must be contiguous).
        positions_T: int32 or int64; a negative position is padding: nothing of its token is read or written.
        rows_T, tables_RB: the block table row of each token.
        rope_PC2: `tpserve.model.rope.rope_table`, float32 [positions, C, 2].
        k_cache, v_cache: [slots, K, E].
    """
    T, H, E = q_THE.shape
    K = k_TKE.shape[1]
    heads = 4 if T < 64 else 16  # few tokens: spread over more multiprocessors
    _rope_and_write_kernel[(T, triton.cdiv(H + 2 * K, heads))](
        q_THE, k_TKE, v_TKE, positions_T, rows_T, tables_RB, rope_PC2, k_cache, v_cache,
        q_THE.stride(0), k_TKE.stride(0), v_TKE.stride(0), tables_RB.stride(0),
        H=H, K=K, C=E // 2, CP=triton.next_power_of_2(E // 2), BLOCK=block_size, HEADS=heads, num_warps=4,
    )  # fmt: skip
