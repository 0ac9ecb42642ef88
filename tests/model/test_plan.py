"""The TP plan: names, chunk bounds and how KV heads are laid over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpserve.model.args import ModelArgs
from tpserve.model.llama import Llama
from tpserve.model.plan import TP_DIM, chunk_bounds, kv_mesh_shape, parameter_kind, tp_dim

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


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_every_query_head_meets_its_kv_head(group: int, n_kv_heads: int, tp: int) -> None:
    n_heads = group * n_kv_heads
    if n_heads % tp or (n_kv_heads % tp and tp % n_kv_heads):
        with pytest.raises(ValueError, match=f"size {tp} "):
            kv_mesh_shape(n_heads, n_kv_heads, tp)
        return
    groups, copies = kv_mesh_shape(n_heads, n_kv_heads, tp)
    assert groups * copies == tp
    for rank in range(tp):
        queries = range(rank * n_heads // tp, (rank + 1) * n_heads // tp)
        kv_share = n_kv_heads // groups
        first_kv = (rank // copies) * kv_share
        for local, head in enumerate(queries):
            assert first_kv + local // (len(queries) // kv_share) == head // group


def test_sizes_that_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"possible sizes: 1, 2, 4, 8, 16, 32, 64$"):
        kv_mesh_shape(64, 8, 3)
