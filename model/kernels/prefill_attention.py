# Kernels are compiled by Triton from their source; a checker sees no types in them.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Chunks of prompts over the paged KV cache (Dao, "FlashAttention-2", 2023).

Shape suffixes: P sequences laid end to end in T tokens, H query heads and K key/value heads of this rank, G = H / K,
E head width, R rows and B blocks of the block tables, I tiles: BM rows of one sequence.

The G query heads of a key/value head share its keys, so a tile's rows are (query, head) pairs: a short chunk fills a
tile with its heads.

Steps with work for the whole of a Hopper GPU go to `prefill_hopper.py`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tpserve.model.kernels import hopper_takes
from tpserve.model.kernels.attend import beside_float8

# Tokens times heads from which on every processor of a Hopper GPU has queries: with 512 tokens of 32 heads 13.2 µs
# instead of 14.0, with 128 tokens 7.9 instead of 5.4.
_HOPPER_ROWS = 16384
HOPPER_TILE = 128  # rows


@dataclasses.dataclass(frozen=True)
class PrefillTiles:
    """Which program attends to what, for all layers of a step.

    Attributes:
        tiles_I5: int32 [I + 1, 5]: a tile's sequence's first token, its number of queries (0: there is no such tile),
            the tile's number in it, the sequence's context and its row. Behind the last tile: a counter of
            `prefill_hopper.py`, zero between launches, and how many tiles there are.
        hopper: of `prefill_hopper.py`.
    """

    tiles_I5: torch.Tensor
    hopper: bool


@triton.jit(do_not_specialize=["rows_ptr", "starts_ptr", "contexts_ptr", "num_seqs", "num_items"])
def _tiles_kernel(
    rows_ptr, starts_ptr, contexts_ptr, tiles_ptr, num_seqs, num_items,
    G: tl.constexpr, BM: tl.constexpr, PP: tl.constexpr, LONGEST_FIRST: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    seqs = tl.arange(0, PP)
    first = tl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
    end = tl.load(starts_ptr + seqs + 1, mask=seqs < num_seqs, other=0).to(tl.int32)
    counts = tl.cdiv((end - first) * G, BM)
    ends = tl.cumsum(counts, 0)
    seq = tl.sum((ends <= item).to(tl.int32), 0)
    mine = seqs == seq
    there = seq < num_seqs
    # A sequence's last tile reads most keys: it goes first, so that the short ones fill the end.
    tile = tl.sum(tl.where(mine, ends - 1 - item, 0), 0)
    queries = tl.sum(tl.where(mine, end - first, 0), 0)
    context = tl.load(contexts_ptr + seq, mask=there, other=0).to(tl.int32)
    place = item
    if LONGEST_FIRST:
        # Tiles of other sequences go in front that read more keys; of as many, those of earlier sequences.
        keys = context + tl.minimum((tile * BM + BM - 1) // G + 1, queries)
        contexts = tl.load(contexts_ptr + seqs, mask=seqs < num_seqs, other=0).to(tl.int32)
        enough = keys - contexts - (seqs < seq).to(tl.int32)
        fewer = tl.maximum(enough, 0) * G // BM
        before = tl.where(end - first <= enough, 0, tl.maximum(counts - fewer, 0))
        place = tl.where(there, tl.sum(tl.where(mine, counts - 1 - tile, before), 0), item)
    out = tiles_ptr + place * 5
    tl.store(out, tl.sum(tl.where(mine, first, 0), 0))
    tl.store(out + 1, queries)
    tl.store(out + 2, tile)
    tl.store(out + 3, context)
    tl.store(out + 4, tl.load(rows_ptr + seq, mask=there, other=0).to(tl.int32))
    if item == 0:
        tl.store(tiles_ptr + num_items * 5, 0)
        tl.store(tiles_ptr + num_items * 5 + 1, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, tables_ptr, tiles_ptr, out_ptr,
    q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, about = tl.program_id(1), tiles_ptr + tl.program_id(0) * 5
    first, queries, tile = tl.load(about).to(tl.int64), tl.load(about + 1), tl.load(about + 2)
    context, row = tl.load(about + 3), tl.load(about + 4).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if queries == 0:
        return
    table_ptr = tables_ptr + row * table_stride
    m, e = tile * BM + tl.arange(0, BM), tl.arange(0, EP)
    query = m // G
    in_head = (head * G + m % G) * E
    mask = (query < queries)[:, None] & (e[None, :] < E)
    q = tl.load(q_ptr + ((first + query) * q_stride + in_head)[:, None] + e[None, :], mask=mask, other=0.0)
    q = beside_float8(q, k_ptr.dtype.element_ty)
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
        k, v = k.to(q.dtype), v.to(q.dtype)  # of float8
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


def _rows_a_tile(E: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows a tile, keys a tile, warps, pipeline stages)."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    # Taller tiles read the keys less often, but two of these fit a multiprocessor and fill each other's waits.
    return 64, 64 if E <= 128 else 32, 4, 3


def _padded(P: int) -> int:
    """Compiled anew for each: two are enough for most."""
    return 16 if P <= 16 else max(256, int(triton.next_power_of_2(P)))


def compile_for_many(
    q_heads: int, k_cache: torch.Tensor, tables_RB: torch.Tensor, dtype: torch.dtype, block_size: int, *, pdl: bool
) -> None:
    """Launches what steps of many rows, or of many sequences, launch; for no queries."""
    hopper = hopper_takes(k_cache, dtype, block_size)
    q_THE, out_THE = (torch.empty(1, q_heads, k_cache.shape[2], dtype=dtype, device=k_cache.device) for _ in range(2))
    most = max(17, len(tables_RB))
    for P in sorted({1, *(_padded(n) for n in range(17, most + 1))}):
        none = torch.zeros(P + 1, dtype=torch.int64, device=k_cache.device)
        for rows in [0, 1 << 40] if hopper else [1 << 40]:
            tiles = prefill_tiles(
                none[:P], none, none[:P], 1, q_heads, k_cache, dtype, block_size=block_size, hopper_rows=rows
            )
            out_THE.zero_()  # stands between, see there
            paged_prefill_attention(q_THE, k_cache, k_cache, tables_RB, tiles, out_THE, block_size=block_size, pdl=pdl)


def prefill_tiles(
    rows_P: torch.Tensor,
    query_start_P1: torch.Tensor,
    context_len_P: torch.Tensor,
    num_tokens: int,
    q_heads: int,
    k_cache: torch.Tensor,
    dtype: torch.dtype,
    *,
    block_size: int,
    hopper_rows: int | None = None,
) -> PrefillTiles:
    """Which program attends to what, for all layers of a step; nothing here waits for the device.

    Args:
        rows_P: the row of each sequence in the block tables, int32 or int64.
        query_start_P1: where each sequence's queries begin, and where the last one's end; int32 or int64. Equal
            neighbours: a sequence without queries.
        context_len_P: keys in the cache before each chunk, int32 or int64.
        num_tokens: at least as many as there are queries.
        q_heads, dtype: of the queries to come.
        k_cache: a layer's.
        hopper_rows: tokens times query heads from which on `prefill_hopper.py` has the step; None: as measured.
    """
    P, G = rows_P.shape[0], q_heads // k_cache.shape[1]
    fewest = _HOPPER_ROWS if hopper_rows is None else hopper_rows
    hopper = num_tokens * q_heads >= fewest and hopper_takes(k_cache, dtype, block_size)
    BM = HOPPER_TILE if hopper else _rows_a_tile(k_cache.shape[2], dtype)[0]
    items = triton.cdiv(num_tokens * G, BM) + P
    tiles_I5 = torch.empty(items + 1, 5, dtype=torch.int32, device=rows_P.device)
    _tiles_kernel[(items,)](
        rows_P, query_start_P1, context_len_P, tiles_I5, P, items, G=G, BM=BM, PP=_padded(P),
        # Keys of many heads do not all stay in the L2 cache: there a sequence's tiles go one after the other (8 · 1,024
        # tokens: 162 µs instead of 195 with 32 heads, 61 instead of 50 with 8).
        LONGEST_FIRST=hopper and k_cache.shape[1] <= 8, num_warps=1,
    )  # fmt: skip
    return PrefillTiles(tiles_I5, hopper)


def paged_prefill_attention(
    q_THE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_RB: torch.Tensor,
    tiles: PrefillTiles,
    out_THE: torch.Tensor,
    *,
    block_size: int,
    pdl: bool = False,
) -> None:
    """Attends query i of a chunk after c keys to its sequence's keys 0 ... c + i.

    Args:
        q_THE: bfloat16, float16 or float32; heads must be contiguous, tokens may be further apart.
        k_cache, v_cache: [slots, K, E], the chunk's own keys and values included.
        tables_RB: int32 or int64 block tables.
        tiles: from `prefill_tiles`, for this many tokens and heads.
        out_THE: written at the sequences' tokens.
        pdl: programmatic dependent launch, where a step is small. Tiles are read before any wait: a kernel that is
            launched normally must stand between the one that made them and this.
    """
    if tiles.hopper:
        from tpserve.model.kernels import prefill_hopper  # Gluon is not in every Triton

        prefill_hopper.launch(q_THE, k_cache, v_cache, tables_RB, tiles.tiles_I5, out_THE, block_size)
        return
    E, K = q_THE.shape[2], k_cache.shape[1]
    G = q_THE.shape[1] // K
    BM, BN, warps, stages = _rows_a_tile(E, q_THE.dtype)
    _prefill_kernel[(len(tiles.tiles_I5) - 1, K)](
        q_THE, k_cache, v_cache, tables_RB, tiles.tiles_I5, out_THE,
        q_THE.stride(0), out_THE.stride(0), tables_RB.stride(0), math.log2(math.e) / math.sqrt(E),
        K=K, G=G, E=E, EP=max(16, triton.next_power_of_2(E)), BLOCK=block_size, BM=BM, BN=BN, STAGES=stages,
        OFFSET=tl.int32 if k_cache.numel() < 2**31 else tl.int64,
        PRECISION="ieee" if q_THE.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
