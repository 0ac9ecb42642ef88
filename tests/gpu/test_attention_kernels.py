"""The Triton attention kernels against float64: fresh random inputs, ragged lengths, shuffled blocks, poison."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tpserve.model.kernels import supports
from tpserve.model.rope import apply_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

SHAPES = [(32, 32, 128), (16, 2, 128), (32, 8, 64), (6, 2, 16), (4, 4, 8), (2, 1, 80), (4, 2, 256)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_decoding_ragged_batches(dtype: torch.dtype, heads: int, kv_heads: int, width: int, block_size: int) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged, ragged

    lens = ragged(33, 900)
    case = paged(
        [n - 1 for n in lens], [1] * 33, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, block_size=block_size
    )
    case.lens[3::5] = 0
    expected = case.reference()
    expected[3::5] = 0
    for cut in case.cuts().values():
        for items in (33, 38, 66, cut.items, 231):
            out = case.decode(dataclasses.replace(cut, items=items))
            assert not out[3::5].any()
            assert error(out, expected) < LIMITS[dtype]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "block_size"), [(32, 2, 128, 48), (24, 2, 64, 48)])
def test_decoding_with_many_heads_to_a_key_and_other_blocks(
    heads: int, kv_heads: int, width: int, block_size: int
) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged, ragged
    from tpserve.model.kernels.decode_plan import Config

    lens, dtype = ragged(12, 900), torch.bfloat16
    case = paged(
        [n - 1 for n in lens], [1] * 12, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, block_size=block_size
    )
    for cut in case.cuts().values():
        assert error(case.decode(cut), case.reference()) < LIMITS[dtype]
        if cut.config.hopper:
            for config in (
                Config(64, 1, 2, 128, 3, True),
                Config(32, 1, 2, 64, 6, True),
                Config(32, 1, 3, 128, 4, True),
            ):
                assert error(case.decode(dataclasses.replace(cut, config=config)), case.reference()) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 64, 65, 5000])
@pytest.mark.parametrize("items", [1, 3, 64])
def test_decoding_one_sequence(dtype: torch.dtype, length: int, items: int) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged

    case = paged([length - 1], [1], heads=16, kv_heads=2, width=128, dtype=dtype)
    for cut in case.cuts().values():
        assert error(case.decode(dataclasses.replace(cut, items=items)), case.reference()) < LIMITS[dtype]


def test_one_graph_serves_growing_lengths() -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged
    from tpserve.model.kernels.decode_plan import deal, decode_scratch

    case = paged([2999, 10, 700, 64], [1] * 4, heads=8, kv_heads=2, width=128, dtype=torch.bfloat16)
    lens = case.lens.clone()
    cut, out = dataclasses.replace(case.cut(), items=20), torch.empty_like(case.q_THE)
    scratch, positions = decode_scratch(4, 8, 128, cut.items, lens.device), lens - 1

    def attend() -> None:
        deal(cut, scratch, case.rows, positions)
        case.decode_into(out, cut, scratch)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    whole = case.reference()
    for replay in range(20):
        positions.copy_((lens if replay % 2 else torch.tensor([1, 0, 0, 0], device=lens.device)) - 1)
        out.fill_(float("nan"))
        graph.replay()
        if replay % 2:
            assert error(out, whole) < LIMITS[torch.bfloat16]
        else:
            first = case.v_cache[case.slots[0][0]].repeat_interleave(4, 0)
            assert torch.equal(out[0], first)
            assert not out[1:].any()


@pytest.mark.parametrize("lens", [[700], [0, 5, 1], [16384, *[256] * 63], [0] * 33, None], ids=str)
@pytest.mark.parametrize("keys", [32, 64])
@pytest.mark.parametrize(("slots", "extra"), [(1, 0), (1, 3), (64, 2), (70, 100)])
def test_items_are_every_key_once_the_longest_sequences_first(
    lens: list[int] | None, keys: int, slots: int, extra: int
) -> None:
    from tpserve.bench.attention_cases import ragged
    from tpserve.model.kernels.decode_plan import Config, Cut, deal, decode_scratch

    lens = lens or ragged(50, 5000)
    S = len(lens)
    slots = max(S, slots)
    cut = Cut(Config(keys, 1, 3, 128, 4), slots, slots + min(S, extra) if S > 1 else slots, 64)
    scratch = decode_scratch(S, 4, 64, cut.items + 1, torch.device("cuda"))
    scratch.items_I8.fill_(12345)
    rows, positions = torch.randperm(S + 3, device="cuda")[:S], torch.tensor(lens, device="cuda") - 1
    deal(cut, scratch, rows, positions)
    items = scratch.items_I8.tolist()
    assert set(items.pop()) == {12345}, "written behind the end"
    without = [item[0] for item in items].count(-1)
    assert all(item[0] == -1 for item in items[:without])
    sequences: dict[int, list[list[int]]] = {}
    for i, item in enumerate(items[without:]):
        sequences.setdefault(item[0], []).append([without + i, *item[1:7]])
    assert [lens[s] for s in sequences] == sorted(lens, reverse=True)
    expected = rows.tolist()
    for s, parts in sequences.items():
        at = 0
        for index, row, start, end, length, splits, first in parts:
            assert (row, start, length, splits, first) == (expected[s], at, lens[s], len(parts), parts[0][0])
            assert index == first + parts.index([index, row, start, end, length, splits, first])
            assert end > start or (lens[s], splits) == (0, 1)
            at = end
        assert at == lens[s]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_chunks_of_prompts(dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged, ragged

    case = paged(
        [9, 3, 0, 0, 1000, *ragged(4, 400)], [1, 0, 37, 200, 65, *ragged(4, 150)],
        heads=heads, kv_heads=kv_heads, width=width, dtype=dtype,
    )  # fmt: skip
    assert error(case.prefill(), case.reference()) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 32, 128), (16, 2, 128), (6, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_chunks_of_prompts_on_hopper(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, block_size: int
) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged, ragged
    from tpserve.model.kernels import hopper_takes

    contexts, queries = [9, 3, 0, 0, 1000, *ragged(8, 700)], [1, 0, 37, 200, 65, *ragged(8, 500)]
    case = paged(contexts, queries, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, block_size=block_size)
    if not hopper_takes(case.k_cache, dtype, block_size):
        pytest.skip("these kernels are Hopper's, in a Gluon that is known")
    tiles = case.tiles(hopper_rows=0)
    for _launch in range(3):  # each leaves the counter of items as it was
        out = torch.full_like(case.q_THE, float("nan"))
        case.prefill_into(out, tiles)
        assert error(out, case.reference()) < LIMITS[dtype]
    assert tiles.tiles_I5[-1].tolist()[0] == 0


def test_tiles_that_read_most_come_first() -> None:
    from tpserve.bench.attention_cases import paged
    from tpserve.model.kernels import hopper_takes

    contexts, queries = [700, 0, 0, 64, 3], [129, 500, 0, 500, 1]
    case = paged(contexts, queries, heads=16, kv_heads=4, width=128, dtype=torch.bfloat16)
    if not hopper_takes(case.k_cache, torch.bfloat16, 16):
        pytest.skip("these kernels are Hopper's, in a Gluon that is known")
    *tiles, (drawn, count, *_) = case.tiles(hopper_rows=0).tiles_I5.tolist()
    first = [sum(queries[:p]) for p in range(5)]
    expected = {(first[p], t) for p in range(5) for t in range(-(-queries[p] * 4 // 128))}
    assert (drawn, count) == (0, len(expected))
    assert {(tile[0], tile[2]) for tile in tiles[:count]} == expected
    assert all(tile[1] == 0 for tile in tiles[count:])
    reads = [context + min((t * 128 + 127) // 4 + 1, n) for _, n, t, context, _ in tiles[:count]]
    assert reads == sorted(reads, reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 77])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_write(dtype: torch.dtype, heads: int, kv_heads: int, width: int, tokens: int, normed: bool) -> None:
    from tpserve.model.kernels.norm import Normed
    from tpserve.model.kernels.rope import rope_and_write

    dim, parts = 256, 4
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, device="cuda").to(dtype)
    sums = torch.rand(tokens, parts, device="cuda") * dim
    norm = Normed(sums, torch.empty(tokens, dim, device="cuda"), sums, 1e-5) if normed else None
    scale = (sums.sum(1) / dim + 1e-5).rsqrt()[:, None, None] if normed else 1.0
    exact = qkv.float().view(tokens, -1, width) * scale
    positions = torch.randperm(200, device="cuda")[:tokens]
    slots = torch.randperm(640, device="cuda")[:tokens]
    if tokens > 1:
        positions[5] = slots[5] = -1
    rope = torch.randn(200, width // 2, 2, device="cuda")
    k_cache, v_cache = (torch.randn(640, kv_heads, width, device="cuda").to(dtype) for _ in range(2))
    live, at = positions >= 0, positions.clamp(min=0)
    expected_q = apply_rope(exact[:, :heads], rope[at])
    expected_q[~live] = 0
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    expected_k[slots[live]] = apply_rope(exact[:, heads : heads + kv_heads], rope[at])[live].to(dtype)
    expected_v[slots[live]] = exact[live, heads + kv_heads :].to(dtype)
    q = torch.full((tokens, heads, width), float("nan"), dtype=dtype, device="cuda")
    rope_and_write(qkv, q, k_cache, v_cache, rope, positions, slots, norm, parts if normed else 0)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(q, expected_q.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(k_cache, expected_k, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(v_cache, expected_v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunks", [1, 16, 17, 300])
def test_chunks_of_many_sequences(chunks: int) -> None:
    from tpserve.bench.attention_cases import LIMITS, error, paged

    lens = [1 + 7 * i % 90 for i in range(chunks)]
    case = paged([3 * i % 50 for i in range(chunks)], lens, heads=8, kv_heads=2, width=64, dtype=torch.bfloat16)
    assert error(case.prefill(), case.reference()) < LIMITS[torch.bfloat16]


def test_supports_says_what_the_kernels_take() -> None:
    cuda = torch.device("cuda")
    assert supports(cuda, torch.bfloat16, 32, 8, 128)
    assert not supports(cuda, torch.float64, 32, 8, 128)
    assert not supports(cuda, torch.bfloat16, 32, 8, 512)
    assert not supports(torch.device("cpu"), torch.float32, 32, 8, 128)
