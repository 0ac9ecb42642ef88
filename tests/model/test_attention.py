"""Paged attention over any mix of prefill, chunks and decode equals attention over whole sequences."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpserve.model.attention import PagedAttention, SequenceSlice
from tpserve.model.kv_cache import PagedKVCache, bytes_per_block

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain causal attention of one sequence in float64; [T, H, E]."""
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1).double() for t in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q.double(), k) / WIDTH**0.5
    scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).float()


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from([1, 4, 16]), st.integers(0, 10**6))
def test_chunks_in_any_batch_equal_the_whole(lengths: list[int], block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    needed = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(needed) + 3).tolist()
    tables = [[order.pop() for _ in range(n)] for n in needed]
    padded = torch.zeros(len(lengths), max(needed), dtype=torch.int64)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = torch.tensor(table)
    cache = PagedKVCache(
        1, sum(needed) + 3, block_size, KV_HEADS, WIDTH, dtype=torch.float32, device=torch.device("cpu")
    )
    for t in (*cache.k, *cache.v):
        t.fill_(torch.nan)  # what nobody wrote must not matter
    q, k, v = ([torch.randn(n, h, WIDTH) for n in lengths] for h in (HEADS, KV_HEADS, KV_HEADS))
    out = [torch.full((n, HEADS, WIDTH), torch.nan) for n in lengths]
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        take = [rng.randint(0, min(n - d, rng.choice([1, 40]))) for d, n in zip(done, lengths, strict=True)]
        chosen = sorted((i for i, n in enumerate(take) if n), key=lambda i: take[i] > 1)
        if not chosen:
            continue
        decodes = [done[i] + 1 for i in chosen if take[i] == 1]
        prefills = [SequenceSlice(done[i], take[i]) for i in chosen if take[i] > 1]
        flat_rows = torch.tensor([i for i in chosen for _ in range(take[i])])
        positions = torch.tensor([p for i in chosen for p in range(done[i], done[i] + take[i])])
        rows = [slice(done[i], done[i] + take[i]) for i in chosen]

        def flat(x: list[torch.Tensor], chosen: list[int] = chosen, rows: list[slice] = rows) -> torch.Tensor:
            return torch.cat([x[i][r] for i, r in zip(chosen, rows, strict=True)])

        result = PagedAttention(cache, padded, flat_rows, positions, decodes, prefills)(0, flat(q), flat(k), flat(v))
        for i, r, part in zip(chosen, rows, result.split([take[i] for i in chosen]), strict=True):
            out[i][r] = part
            done[i] += take[i]
    for i in range(len(lengths)):
        torch.testing.assert_close(out[i], _whole(q[i], k[i], v[i]), atol=1e-5, rtol=1e-4)


def test_bytes_per_block() -> None:
    # Llama-2 7B: 32 layers, 32 heads of 128, bf16: 512 KiB a token.
    assert bytes_per_block(32, 16, 32, 128, torch.bfloat16) == 16 * 512 * 1024
