"""The TP plan: names, chunk bounds and how KV heads are laid over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama
from tpserve.model.plan import TP_DIM, chunk_bounds, even_bounds, parameter_kind, shares, show_shares, tp_dim
from tpserve.model.quantized_plan import show_quantization

ARGS = ModelArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50, ffn_hidden_dim=48)


def test_the_plan_names_every_parameter_and_no_other() -> None:
    with torch.device("meta"):
        names = list(Llama(ARGS).state_dict())
    assert {parameter_kind(name) for name in names} == set(TP_DIM)
    assert len(names) == 3 + ARGS.n_layers * (len(TP_DIM) - 3)


@pytest.mark.parametrize(
    "name",
    [
        "attention.wq.weight",
        "layers.0.output.weight",
        "layers.x.attention.wq.weight",
        "layers.0.attention.wq.bias",
        "rope.freqs",
        "layers.0",
        "",
    ],
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(KeyError):
        tp_dim(name)


@given(st.integers(1, 300), st.integers(1, 64))
def test_chunk_bounds_are_torch_chunks(size: int, n: int) -> None:
    assert [b - a for a, b in chunk_bounds(size, n)] == [len(c) for c in torch.arange(size).chunk(n)]


@given(st.integers(0, 300), st.integers(1, 64))
def test_even_bounds(size: int, n: int) -> None:
    parts = [hi - lo for lo, hi in even_bounds(size, n)]
    assert sum(parts) == size
    assert max(parts) - min(parts) <= 1
    assert parts == sorted(parts, reverse=True)


def covers(spans: list[tuple[int, int]], size: int) -> bool:
    return [i for lo, hi in spans for i in range(lo, hi)] == list(range(size))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64), st.integers(1, 700), st.integers(1, 200))
def test_every_number_of_ranks(group: int, n_kv_heads: int, tp: int, ffn: int, vocab: int) -> None:
    n_heads = group * n_kv_heads
    args = ModelArgs(2 * n_heads, 1, n_heads, n_kv_heads, vocab, ffn)
    if tp > n_heads or tp > ffn:
        with pytest.raises(ValueError, match=f"size {tp} "):
            shares(args, tp)
        return
    every = shares(args, tp)
    assert len(every) == tp
    assert covers([share.heads for share in every], n_heads)
    assert covers([share.ffn for share in every], ffn)
    assert covers([share.vocab for share in every], vocab)
    for share in every:
        heads, kv_heads = range(*share.heads), range(*share.kv_heads)
        assert len(heads) % len(kv_heads) == 0
        for local, head in enumerate(heads):  # the kernels' rule, on one rank's own heads
            assert kv_heads[local // (len(heads) // len(kv_heads))] == head // group
    most, fewest = (f(hi - lo for lo, hi in (share.heads for share in every)) for f in (max, min))
    assert most - fewest <= (group if tp <= n_kv_heads else max(1, -(-group // 2)))
    if tp <= n_kv_heads:
        assert covers([share.kv_heads for share in every], n_kv_heads)
    assert min(hi - lo for lo, hi in (share.ffn for share in every)) > 0


def test_what_divides_is_split_evenly() -> None:
    args = ModelArgs(4096, 32, 32, 8, 32000, 11008)
    for tp in (1, 2, 4, 8, 16, 32):
        sizes = {tuple(hi - lo for lo, hi in (s.heads, s.ffn, s.vocab)) for s in shares(args, tp)}
        assert sizes == {(32 // tp, 11008 // tp, 32000 // tp)}


def test_slices_of_parameters() -> None:
    args = ModelArgs(64, 5, 8, 4, 512, 172)
    share = shares(args, 3)[1]
    assert (share.heads, share.kv_heads, share.ffn, share.vocab) == ((4, 6), (2, 3), (60, 116), (171, 342))
    assert share.of("layers.2.attention.wq.weight", 8) == (0, 32, 48)
    assert share.of("layers.2.attention.wk.weight", 8) == (0, 16, 24)
    assert share.of("layers.2.attention.wo.weight", 8) == (1, 32, 48)
    assert share.of("layers.2.feed_forward.w2.weight", 8) == (1, 60, 116)
    assert share.of("output.weight", 8) == (0, 171, 342)
    assert share.of("norm.weight", 8) is None
    assert share.of("tok_embeddings.weight", 8) is None


def test_the_table_says_who_holds_what() -> None:
    table = show_shares(ModelArgs(64, 5, 8, 4, 512, 172), 5).splitlines()
    assert table[1].split()[:5] == ["0", "0-0", "0-0", "0-35", "0-102"]
    assert table[-1].endswith("held twice or more: 1")


def test_the_plan_of_int4_says_where_groups_are_cut() -> None:
    args = ModelArgs(128, 2, 8, 4, 90, 384)
    assert "128" in show_quantization(args, "int4", 1)
    table = show_quantization(args, "int4", 8)
    assert "wo has groups of 128 inputs, the ranks' slices of it: none; 8 ranks widen it" in table
    assert "w2 is not: no size of group divides its 172 inputs" in show_quantization(
        ModelArgs(64, 5, 8, 4, 512, 172), "int4", 2
    )
    assert show_quantization(args, "int8", 8) == "the layers' matrices are int8"
